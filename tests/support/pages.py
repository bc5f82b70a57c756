"""The pages that people read, and what stands in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
GUIDES = ROOT / "docs" / "guides"
SHOWN = [README, *sorted((ROOT / "docs").rglob("*.md"))]  # whose Python runs as it stands there
OTHERS = ("CHANGELOG.md", "bench/README.md", "findings/README.md")
PAGES = [*SHOWN, CONTRIBUTING, *(ROOT / name for name in OTHERS)]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of code in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.M | re.S)


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """What its sentences set as code."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))
