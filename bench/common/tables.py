"""Tables as text."""

from __future__ import annotations


def align(rows: list[list[str]], left: bool = False) -> str:
    """The first column to the left, the others to the right unless ``left``; a mark after a figure sticks out."""
    widths = [max(len(row[i].removesuffix(" s")) for row in rows) for i in range(len(rows[0]))]
    marked = [any(row[i].endswith(" s") for row in rows[1:]) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width, has_marks in zip(row[1:], widths[1:], marked[1:], strict=True):
            figure = cell.removesuffix(" s")
            padded = figure.ljust(width) if left else figure.rjust(width)
            cells.append(padded + (cell[len(figure) :].ljust(2) if has_marks else ""))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
