"""Links, paths and names in pages lead somewhere, tables are the code's, and the README is one page."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from markdown.extensions.toc import slugify
from pages import PAGES, README, ROOT, name_of, prose, spans, text_of

import fastdpo
from fastdpo.loss import LossOptions
from fastdpo.loss.objectives import OBJECTIVES


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+?)\s*$", prose(page), re.M)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        assert file.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)}: {target}"


def test_paths_that_are_spoken_of_exist() -> None:
    missing = {
        (name_of(page), path)
        for page in PAGES
        for span in spans(page)
        for path in re.findall(r"(?<![\w./-])(?:(?:bench|csrc|docs|fastdpo|findings|tests|\.ci)/[\w./*-]*[\w/*])", span)
        if not list(ROOT.glob(path)) and "NAME" not in path
    }
    assert not missing


def test_names_that_are_spoken_of_exist() -> None:
    def exists(name: str) -> bool:
        parts = name.split(".")
        for size in range(len(parts), 0, -1):
            try:
                found: Any = importlib.import_module(".".join(parts[:size]))
            except ImportError:
                continue
            return all((found := getattr(found, part, None)) is not None for part in parts[size:])
        return False

    said = {match[1] for page in PAGES for span in spans(page) if (match := re.match(r"(fastdpo(?:\.\w+)+)\b", span))}
    assert "fastdpo.DPOTrainer" in said
    assert not [name for name in said if not exists(name)]


def test_environment_variables_that_are_spoken_of_are_read() -> None:
    said = {name for page in PAGES for name in re.findall(r"\bFASTDPO_[A-Z_]*[A-Z]", text_of(page))}
    files = [file for room in ("csrc", "fastdpo", "bench") for file in (ROOT / room).rglob("*.[chps]*")]
    code = "\n".join(text_of(file) for file in files if file.suffix in (".py", ".cpp", ".h", ".sh"))
    assert said and not [name for name in said if name not in code]


def test_the_readme_is_one_page() -> None:
    assert len(text_of(README).splitlines()) <= 120


def table(page: Path, first_column: str) -> dict[str, list[str]]:
    """The rows of the table whose first heading this is: the name in the first cell, and the other cells."""
    rows = re.search(rf"^\| {first_column} \|.*\n\| ---.*\n((?:\|.*\n)+)", text_of(page), re.M)[1].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return {first.strip("` "): others for first, *others in cells}


LOSSES = ROOT / "docs" / "losses.md"


def test_every_loss_is_listed_with_its_papers() -> None:
    rows = table(LOSSES, "`loss_type`")
    assert list(rows) == list(OBJECTIVES)
    for name, (_, paper) in rows.items():
        documented = inspect.getdoc(OBJECTIVES[name].function) or ""
        for citation in (r"\b\d{4}\.\d{5}\b", r"\beq\. \d+(?:\.\d+)?"):
            assert set(re.findall(citation, paper)) == set(re.findall(citation, documented)), name


def test_every_option_is_listed_with_its_losses() -> None:
    rows = table(LOSSES, "option")
    common = ("beta", "loss_type", "loss_weights")
    options = {option.name: option.default for option in fields(LossOptions) if option.name not in common}
    assert list(rows) == list(options)
    for name, (default, said) in rows.items():
        assert default.strip('"') == str(options[name]), name
        named = set(re.findall(r"`(\w+)`", said))
        assert named <= set(OBJECTIVES), name
        listed = set(OBJECTIVES) - named if said.startswith("all") else named
        assert listed == {loss for loss, objective in OBJECTIVES.items() if name in objective.options}, name


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(map(text_of, (ROOT / "docs" / "reference").glob("*.md")))
    documented = {getattr_of(path) for path in re.findall(r"^::: ([\w.]+)$", pages, re.M)}
    for module in (fastdpo, fastdpo.logps, fastdpo.loss, fastdpo.model, fastdpo.trainer, fastdpo.data):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert value in documented, f"{module.__name__}.{name}"


def getattr_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        return importlib.import_module(path)
