"""The extension by which docstrings become the reference: links, types of parameters, and what it warns of."""

from __future__ import annotations

import logging
import textwrap
from pathlib import Path

import griffe
import pytest

EXTENSION = Path(__file__).parents[2] / "docs" / "docstrings.py"
MODULE = '''
from dataclasses import dataclass


class Given:
    """What :meth:`use` is given."""

    def use(self) -> None:
        """Uses it; see :func:`helper` and :class:`package.other.Other`."""


@dataclass
class Options:
    """Options.

    Args:
        a, b: numbers.
    """

    a: int
    b: int


class Result:
    """A result.

    Attributes:
        first: the first.
        x, y: the others.
        made: set when it is made.
        z, odd: of two types.

    Raises:
        TypeError, ValueError: never.
    """

    first: str
    x: float
    y: float
    z: bytes
    odd: list[int]


def helper(x: float, y: float, z: str, **options: int) -> None:
    """Helps.

    Args:
        x, y: coordinates.
        z, options: others.
    """
'''
OTHER = '''
"""As :class:`Missing` says, and :func:`package.module.missing`."""


class Other:
    """No roles here: `func`."""


def lacking(x: int) -> None:
    """Lacks a parameter.

    Args:
        x, y: coordinates.
    """
'''


@pytest.fixture
def package(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> griffe.Object:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""A package."""\nfrom package.module import helper\n')
    (folder / "module.py").write_text(textwrap.dedent(MODULE))
    (folder / "other.py").write_text(textwrap.dedent(OTHER).lstrip())
    with caplog.at_level(logging.WARNING):
        return griffe.load(
            "package",
            search_paths=[tmp_path],
            extensions=griffe.load_extensions("dataclasses", str(EXTENSION)),
            docstring_parser="google",
            docstring_options={"warn_unknown_params": False, "warn_missing_types": False},
        )


def described(obj: griffe.Object, kind: str = "parameters") -> dict[str, str | None]:
    """Name as it stands in the docstring -> the type that the reference shows for it."""
    (section,) = [s for s in obj.docstring.parsed if s.kind.value == kind]
    types = {x.name.replace("\N{NO-BREAK SPACE}", " "): x.annotation for x in section.value}
    return {name: None if kind is None else str(kind) for name, kind in types.items()}


def link(path: str, name: str) -> str:
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


def test_roles_become_links_to_what_their_place_sees(package: griffe.Object) -> None:
    assert package["module.Given"].docstring.value == f"What {link('package.module.Given.use', 'use')} is given."
    to_helper, to_other = link("package.module.helper", "helper"), link("package.other.Other", "package.other.Other")
    assert package["module.Given.use"].docstring.value == f"Uses it; see {to_helper} and {to_other}."
    assert package["other.Other"].docstring.value == "No roles here: `func`."


def test_parameters_that_share_a_description_have_a_type_where_it_is_one(package: griffe.Object) -> None:
    assert described(package["module.helper"]) == {"x, y": "float", "z, options": None}
    assert described(package["module.Options"]) == {"a, b": "int"}


def test_so_have_attributes(package: griffe.Object) -> None:
    found = described(package["module.Result"], "attributes")
    assert found == {"first": "str", "x, y": "float", "made": None, "z, odd": None}
    (raises,) = [s for s in package["module.Result"].docstring.parsed if s.kind.value == "raises"]
    assert [str(x.annotation) for x in raises.value] == ["(TypeError, ValueError)"]


@pytest.mark.usefixtures("package")
def test_what_does_not_exist_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert sorted(record.getMessage() for record in caplog.get_records("setup")) == [
        "package.other.lacking: of the parameters 'x, y' the signature lacks some",
        "package.other: the docstring refers to Missing, which does not exist",
        "package.other: the docstring refers to package.module.missing, which does not exist",
    ]
