"""Our docstrings as mkdocstrings should read them: an extension of griffe's, which parses them.

Cross-references, ``:func:`name` `` and the like, become links where some page has what they name, and names where none
has; parameters and attributes that share a description, ``a, b: …``, get their type as others do. A reference to what
does not exist, and a parameter that the signature does not have, are warnings, on which a strict build fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

NO_BREAK = "\N{NO-BREAK SPACE}"
_ATTRIBUTES = re.compile(r"(?<=^Attributes:\n)(?:(?: .*)?\n?)+", re.M)
_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Reads every docstring of a package once all of it is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        for obj in list(_objects(pkg)):
            if obj.docstring is not None:
                obj.docstring.value = _ATTRIBUTES.sub(_keep_names_together, link_roles(obj, obj.docstring.value))
                _give_types(obj, obj.docstring)


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    """The object and all that is defined in it; not what is imported there."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def link_roles(obj: griffe.Object, text: str) -> str:
    """The text of obj's docstring with optional references, links where there is a page, in the place of roles."""

    def link(role: re.Match[str]) -> str:
        path = _path(obj, role[1])
        if path is None:
            griffe.logger.warning(f"{obj.path}: the docstring refers to {role[1]}, which does not exist")
            return f"`{role[1]}`"
        return f'<autoref identifier="{path}" optional><code>{role[1]}</code></autoref>'

    return _ROLE.sub(link, text)


def _path(obj: griffe.Object, name: str) -> str | None:
    """Where a name, as its docstring's place sees it, is defined; None if nowhere."""
    scope: griffe.Object | None = obj
    while scope is not None:
        found = _member(obj.package, f"{scope.path}.{name}")
        if found is not None:
            return found
        scope = scope.parent
    return _member(obj.package, name)


def _member(package: griffe.Module, path: str) -> str | None:
    try:
        return package[path.removeprefix(f"{package.path}.")].canonical_path
    except (KeyError, griffe.AliasResolutionError):
        return None


def _keep_names_together(attributes: re.Match[str]) -> str:
    """griffe takes what follows an attribute's first space for its type."""
    return re.sub(
        r"^ {4}\w+(?:, \w+)+(?=:)",
        lambda names: f"    {names[0].strip().replace(' ', NO_BREAK)}",
        attributes[0],
        flags=re.M,
    )


def _give_types(obj: griffe.Object, docstring: griffe.Docstring) -> None:
    """Types for names that share a description, and a warning for parameters that the signature does not have."""
    for section in docstring.parsed:
        if section.kind is griffe.DocstringSectionKind.attributes:
            members = {name: getattr(member, "annotation", None) for name, member in obj.members.items()}
            for described in section.value:
                described.annotation = _common_type(members, described.name)
        elif section.kind is griffe.DocstringSectionKind.parameters and hasattr(obj, "parameters"):
            types = {parameter.name.lstrip("*"): parameter.annotation for parameter in obj.parameters}
            for described in section.value:
                if not types.keys() >= set(_names(described.name)):
                    griffe.logger.warning(f"{obj.path}: of the parameters {described.name!r} the signature lacks some")
                described.annotation = _common_type(types, described.name)


def _names(described: str) -> list[str]:
    return [name.strip() for name in described.split(",")]


def _common_type(types: dict[str, Any], described: str) -> Any:
    """The type of names, where they have one."""
    found = {str(types.get(name)): types.get(name) for name in _names(described)}
    return next(iter(found.values())) if len(found) == 1 else None
