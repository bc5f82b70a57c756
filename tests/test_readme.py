"""What the README shows, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_snippet_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    snippets = [block for block in blocks if "from fastdpo" in block]
    assert snippets
    for snippet in snippets:
        names: dict[str, object] = {}
        exec(compile(snippet, str(README), "exec"), names)
        assert names["hidden"].grad.isfinite().all()
        assert names["weight"].grad.abs().sum() > 0
