"""What the standard library's JSON parser gives up on, in words."""

from __future__ import annotations

import json
import sys

# What json.loads raises about its text: a JSONDecodeError, or that there are too many digits, or too much depth.
UNREADABLE = (ValueError, RecursionError)


def what_is_wrong(error: Exception) -> str:
    """Of one of ``UNREADABLE``."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply to be read"
    return f"not to be read: a number in it has more than {sys.get_int_max_str_digits()} digits"
