"""The tables that a run prints."""

from __future__ import annotations

from typing import Any

from common.tables import align

LEGEND = """\
ms: forward and backward, median over the rounds; x floor, x fastdpo: its time over theirs, median of the rounds'
ratios; floor: the matrix products alone; MB: peak memory beyond inputs and gradients; errors against float64: logps
max |error| / (1 + |logp|), over tokens, or sequences where marked s; loss relative; dhidden, dweight relative
Frobenius norms on samples."""

_MEMORY = "peak MB beyond inputs and gradients"


def case_table(found: dict[str, Any]) -> str:
    with_errors = any(entry.get("errors") for entry in found["peers"].values())
    columns = ["", "ms", "x floor", "x fastdpo", "MB"]
    if with_errors:
        columns += ["logps", "loss", "dhidden", "dweight"]
    rows = [_row(name, entry, with_errors) for name, entry in found["peers"].items() if entry["status"] == "measured"]
    return "\n".join([_title(found), "", align([columns, *rows]), *_excuses(found)])


def sweep_tables(axis: str, points: list[dict[str, Any]]) -> str:
    """Peers by points: time, time per token, memory; the axis is tokens, vocabulary or answers."""
    key = {"tokens": "tokens", "vocabulary": "vocab_size", "answers": "answers"}[axis]
    header = [axis, *(f"{point[key]:,}" for point in points)]
    count, which = ("distinct_scored_tokens", ", each answer once") if axis == "answers" else ("tokens", "")
    figures = {
        "milliseconds": lambda point, entry: _number(entry["seconds"] * 1e3),
        f"microseconds per token{which}": lambda point, entry: _number(entry["seconds"] * 1e6 / point[count]),
        _MEMORY: lambda point, entry: _megabytes(entry["peak_bytes"]),
    }
    parts = [f"{_shape(points[0], without=key)}"]
    if axis == "answers":
        by = {"of the pairs' rows": "scored_tokens", "each answer once": "distinct_scored_tokens"}
        rows = [["pairs", *(str(point["pairs"]) for point in points)]]
        rows += [[name, *(f"{point[count]:,}" for point in points)] for name, count in by.items()]
        parts.append(f"scored tokens\n{align([header, *rows])}")
    for title, figure in figures.items():
        rows = []
        for name in points[0]["peers"]:
            if name == "floor" and title == _MEMORY:
                continue
            entries = [(point, point["peers"][name]) for point in points]
            if any(entry["status"] == "measured" for _, entry in entries):
                cells = (figure(point, entry) if entry["status"] == "measured" else "-" for point, entry in entries)
                rows.append([name, *cells])
        parts.append(f"{title}\n{align([header, *rows])}")
    notes = dict.fromkeys(note for point in points for note in _excuses(point))
    return "\n\n".join(parts) + "".join(f"\n{note}" for note in notes)


def outputs_table(found: dict[str, Any]) -> str:
    """What outputs.py found of a case: extra time in percent, of a forward and of a whole step."""
    passes = found["passes"]
    times = ", ".join(f"{name} {_number(one['seconds'] * 1e3)} ms" for name, one in passes.items())
    sizes = (
        f"H {found['hidden_size']:,}, V {found['vocab_size']:,}, {found['scored_tokens']:,} tokens, {found['dtype']}"
    )
    rows = [
        [name, *(f"{100 * one['extra'][name]:+.1f}" for one in passes.values())] for name in passes["step"]["extra"]
    ]
    header = ["", *(f"% {name}" for name in passes)]
    return f"{found['name']}: {sizes}\nwithout: {times}\n\n{align([header, *rows])}"


def _title(found: dict[str, Any]) -> str:
    line = f"{found['name']}: {_shape(found)}"
    if found.get("answers", 2) > 2:
        once = f"{found['distinct_scored_tokens']:,} scored tokens with each answer once"
        line += f"\n{found['answers']} answers to {_prompts(found)}, every two a pair: {once}"
    floor = found["peers"].get("floor", {})
    if "seconds" in floor:
        work, rate = found["flops"] / 1e9, found["flops"] / 1e9 / floor["seconds"]
        line += f"\nfloor: {found['products']} products a token, {work:,.1f} GFLOP at {rate:,.0f} GFLOP/s"
    return line


def _shape(found: dict[str, Any], without: str = "") -> str:
    parts = [f"H {found['hidden_size']:,}"]
    if without != "vocab_size":
        parts.append(f"V {found['vocab_size']:,}")
    if without == "answers":
        parts.append(f"{found['length']:,} tokens a row, all pairs of the answers to {_prompts(found)}")
    elif without != "tokens":
        pairs = "1 pair" if found["pairs"] == 1 else f"{found['pairs']} pairs"
        parts.append(f"{found['tokens']:,} tokens in {pairs}, {found['scored_tokens']:,} scored")
    if found["softcap"] is not None:
        parts.append(f"softcap {found['softcap']:g}")
    parts += [found["dtype"], "weight frozen" if found["frozen"] else "all trainable"]
    parts.append("reference cached" if found["cached"] else "reference computed")
    return ", ".join(parts)


def _prompts(found: dict[str, Any]) -> str:
    count = 2 * found["pairs"] // (found["answers"] * (found["answers"] - 1))
    return "1 prompt" if count == 1 else f"each of {count} prompts"


def _row(name: str, entry: dict[str, Any], with_errors: bool) -> list[str]:
    row = [name, _number(entry["seconds"] * 1e3)]
    row += [f"{entry[key]:.2f}" if key in entry else "-" for key in ("ratio_to_floor", "ratio_to_fastdpo")]
    row.append("-" if name == "floor" else _megabytes(entry["peak_bytes"]))
    if with_errors:
        errors = entry["errors"] or dict.fromkeys(("logps", "loss", "grad_hidden", "grad_weight", "logps_of"))
        cells = [_error(errors[key]) for key in ("logps", "loss", "grad_hidden", "grad_weight")]
        cells[0] += " s" if errors["logps_of"] == "sequences" else ""
        row += cells
    return row


def _excuses(found: dict[str, Any]) -> list[str]:
    said = {"absent": "absent", "refused": "not measured", "failed": "FAILED"}
    peers = found["peers"].items()
    return [f"{name}: {said[entry['status']]}: {entry['reason']}" for name, entry in peers if "reason" in entry]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
