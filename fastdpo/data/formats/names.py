"""Names of columns: those in which public sets keep the prompt, and what is said where one is missing."""

from __future__ import annotations

import difflib
from collections.abc import Collection

PROMPT_NAMES = ("question", "instruction", "input", "query", "context", "user", "problem")


def missing_columns_message(found: Collection[str], source: str) -> str | None:
    """What to say of columns without ``chosen`` or ``rejected``, or a group's; None where they are there."""
    missing = [name for name in ("chosen", "rejected") if name not in found]
    if not missing or {"prompt", "completions"} <= {*found}:
        return None
    near = {name: difflib.get_close_matches(name, found, n=1, cutoff=0.75) for name in missing}
    hints = "".join(f" Is {match[0]!r} meant for {name!r}?" for name, match in near.items() if match)
    return (
        f"{source}: missing column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}; found "
        f"{', '.join(map(repr, found))}. Needed: 'chosen' and 'rejected', and 'prompt' unless both begin with it, or "
        f"a format that is known (docs/data.md lists them); --columns chosen=good,rejected=bad reads columns of other "
        f"names.{hints}"
    )
