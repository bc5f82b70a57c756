"""Text from outside as a terminal, or a page, may be given it: shown, and never obeyed."""

from __future__ import annotations

import unicodedata

# Of Unicode's control and format characters, those that only break or indent a line, and those that words are spelt
# with: the joiners of Indic and Arabic scripts and of emoji, the soft hyphen, the signs of Arabic numbers.
_HARMLESS = frozenset("\n\t\u200c\u200d\u00ad\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u08e2")
# Cc: ESC, NUL, carriage return, the C1 controls. Cf: what turns the direction of writing, and marks without a width.
# Cs: halves of a pair, as in file names that are not UTF-8. Zl, Zp: line ends of another kind.
_KINDS = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))

# What begins or ends something in Markdown, anywhere in a line. CommonMark lets a backslash stand before each.
_MARKS = frozenset("\\`*_{}[]()<>#!|~&$")


def visible(text: str) -> str:
    """Control characters by their codes, so that a terminal shows them and does not obey them."""
    if text.isprintable():  # nothing of these kinds is
        return text
    return "".join(char if char in _HARMLESS or not _is_control(char) else _code(char) for char in text)


def visible_line(text: str) -> str:
    """The same in one line: for names, which may hold a line's end as well."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def in_markdown(text: str) -> str:
    """The same as words in a line of Markdown, whatever marks of Markdown or HTML are in it."""
    return "".join(f"\\{char}" if char in _MARKS else char for char in visible_line(text))


def code_span(text: str) -> str:
    """The same as a code span of Markdown."""
    text = visible_line(text)
    fence = "`"
    while fence in text:
        fence += "`"
    room = " " if len(fence) > 1 else ""  # which is not part of it
    return f"{fence}{room}{text}{room}{fence}"


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in _KINDS


def _code(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
