"""Settings without secrets, for whatever writes them: files, reporters, the terminal.

Values are looked at, whatever the setting is called: those that have an access token's form, passwords inside URLs,
the environment's tokens, the one that the Hub's client is logged in with, and what stands under a key that says so
(``{"token": …}``), at any depth. A value that was once known as a secret is hidden wherever else it stands.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from huggingface_hub import get_token

HIDDEN = "(hidden)"
Settings = TypeVar("Settings")

# Shorter values may be parts of common words, and are hidden where they stand alone.
_SHORTEST = 8
# A key's last word, or its last two; "token" after another word than one of a tokenizer's.
_SECRET_WORDS = frozenset(
    ("password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey", "authorization")
)
_SECRET_PAIRS = frozenset(("api key", "access key", "private key", "secret key", "signing key", "account key"))
_OTHER_TOKENS = frozenset(
    ("pad", "eos", "bos", "unk", "sep", "cls", "mask", "end", "start", "eod", "stop", "decoder", "image", "audio")
)
_FORMS = re.compile(
    r"""
    \b(?:hf_|api_org_)[A-Za-z0-9]{8,}                     # Hugging Face
    | \bgh[pousr]_[A-Za-z0-9]{16,} | \bgithub_pat_\w{16,}
    | \bglpat-[\w-]{16,}
    | \bsk-[\w-]{16,}                                     # several providers of models
    | \bAKIA[0-9A-Z]{16}\b                                # Amazon
    | \bAIza[\w-]{30,}                                    # Google
    | \bxox[abeoprs]-[\w-]{10,}                           # Slack
    | \beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+                # JSON web tokens
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?-----END\ [A-Z ]*PRIVATE\ KEY-----
    """,
    re.VERBOSE | re.DOTALL,
)
# One slash is what a path makes of two.
_URL_USER = re.compile(r"(:/{1,2})[^/?#\s@]+(?=@)")
_URL_QUERY = re.compile(r"(?<=[?&;])([\w.%-]+)=([^&;#\s\"']+)")
# What presigned URLs call theirs.
_SIGNATURES = frozenset(("sig", "signature"))

_known: set[str] = set()


def remember_secrets(settings: Mapping[str, Any]) -> None:
    """Hide the secrets among these settings from here on, wherever they stand: in messages, and in commands."""
    _known.update(secret for secret in _secrets_under_keys(settings) if len(secret) >= _SHORTEST)


def redacted(value: Any, hidden: str | None = HIDDEN) -> Any:
    """``value`` without the secrets in it.

    Args:
        value: text, or text in dicts, lists and tuples, at any depth. Anything else comes back as it is.
        hidden: what stands for a value that is a secret as a whole. What is a part of a text becomes ``(hidden)``.
    """
    if isinstance(value, str):
        return _without(value, _all_known())
    if isinstance(value, Mapping):
        return {
            key: _all_hidden(inner, hidden) if is_secret_name(key) else redacted(inner, hidden)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        inner = [redacted(item, hidden) for item in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return value


def redacted_words(words: Sequence[str]) -> list[str]:
    """The words of a command line without the secrets in them, and after flags whose names say so."""
    kept, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        names_secret = word.startswith("--") and is_secret_name(name)
        kept.append(HIDDEN if hide else f"{name}={HIDDEN}" if names_secret and equals else redacted(word))
        hide = not hide and names_secret and not equals
    return kept


def without_secrets(settings: Settings) -> Settings:
    """A copy of an object of settings whose secrets are None, so that who reads it back takes their own."""
    clean = copy.copy(settings)
    for name, value in redacted(vars(clean), hidden=None).items():
        setattr(clean, name, value)
    return clean


def is_secret_name(name: Any) -> bool:
    """Whether what stands under this name is a secret: ``hub_token``, ``--api-key``; not ``pad_token``."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", str(name)).lower().replace("-", "_").strip("_").split("_")
    if words[-1] == "token":
        return words[-2:-1] == [] or words[-2] not in _OTHER_TOKENS
    return words[-1] in _SECRET_WORDS or " ".join(words[-2:]) in _SECRET_PAIRS


def _all_hidden(value: Any, hidden: str | None) -> Any:
    """What stands under a name that says that it is a secret; numbers and switches, as ``token=True``, are none."""
    if isinstance(value, (str, bytes)):
        return hidden if value else value
    if isinstance(value, Mapping):
        return {key: _all_hidden(inner, hidden) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_all_hidden(inner, hidden) for inner in value]
    return value


def _texts_in(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return set().union(*map(_texts_in, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return set().union(*map(_texts_in, value))
    return {value} if isinstance(value, str) and value else set()


def _secrets_under_keys(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        found = (_texts_in(inner) for key, inner in value.items() if is_secret_name(key))
        return set().union(*found, *(_secrets_under_keys(inner) for inner in value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(_secrets_under_keys, value))
    parsed = _parsed(value)
    return set() if parsed is None else _secrets_under_keys(parsed)


def _parsed(value: Any) -> dict[str, Any] | None:
    """The object that a text is as JSON; None where it is not."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return None
    try:
        parsed = json.loads(value)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _all_known() -> frozenset[str]:
    environment = (value for name, value in os.environ.items() if is_secret_name(name))
    return frozenset(value for value in (*_known, *environment, _logged_in() or "") if len(value) >= _SHORTEST)


@functools.cache
def _logged_in() -> str | None:
    return get_token()


def _without(text: str, known: frozenset[str]) -> str:
    head, brace, rest = text.partition("{")
    if brace and (parsed := _parsed(brace + rest)) is not None:  # a flag's value, or --name={…}
        clean = redacted(parsed)
        if clean != parsed:
            text = head + json.dumps(clean, ensure_ascii=False)
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _FORMS.sub(HIDDEN, text)
    text = _URL_USER.sub(rf"\1{HIDDEN}", text)
    return _URL_QUERY.sub(_without_value, text)


def _without_value(match: re.Match[str]) -> str:
    name = match[1]
    is_secret = is_secret_name(name) or re.split(r"[_-]", name.lower())[-1] in _SIGNATURES
    return f"{name}={HIDDEN}" if is_secret else match[0]
