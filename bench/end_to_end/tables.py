"""The tables that a run prints."""

from __future__ import annotations

from typing import Any

from common.tables import align
from end_to_end.profile import COUNTS, PARTS

LEGEND = """\
pairs/s: optimiser steps alone; with cache: the same with the cached reference's own pass, in a run of one epoch, and
of three; x NAME: pairs/s over NAME's, median of the rounds' ratios; CPU s: time of all cores in a step; MB: peak
memory beyond what the process held before the model was made; loss, norm: the largest difference from TRL's own loss
(absolute) and gradient norm (relative) in any step, in the same order of the pairs."""

PROFILE_LEGEND = """\
Per optimiser step, from a run with hooks: tokens through the policy's and the reference's body, padding included and
recomputed activations counted once; positions that the policy's head scores; seconds."""

ANSWERS_LEGEND = """\
Per optimiser step: pairs; tokens of their rows, two a pair; tokens through the policy's body and positions that its
head scores, counted in the run with hooks; seconds; milliseconds for a token through the body; pairs a second."""
_STEP = ("pairs", "of their rows", "through the body", "head positions", "s/step", "ms/token", "pairs/s")

# what is shown -> arm, its peer, figure, bound
_BARS: list[tuple[str, str, str, str, float]] = [
    ("pairs/s, TRL at its best", "fastdpo-cached", "trl-best", "speed_over", 2.0),
    ("pairs/s, TRL at its best, with the cache of one epoch", "fastdpo-cached", "trl-best", "speed_over_1_epochs", 2.0),
    ("pairs/s, TRL's default", "fastdpo-cached", "trl", "speed_over", 3.0),
    ("pairs/s, TRL at its best with our head", "fastdpo-cached", "trl-best+head", "speed_over", 1.8),
    ("pairs/s, both as installed", "fastdpo", "trl", "speed_over", 2.0),
    ("pairs/s, both as installed, TRL with our head", "fastdpo", "trl+head", "speed_over", 1.8),
    ("peak memory, TRL at its best", "fastdpo-cached", "trl-best", "memory_over", 0.5),
    ("peak memory, both as installed", "fastdpo", "trl", "memory_over", 0.5),
]
# The same of several answers to a prompt: the groups' over the pairs' of before, and TRL's.
_ANSWERS_BARS: dict[int, list[tuple[str, str, str, str, float]]] = {
    4: [
        ("pairs/s, the build before", "fastdpo-groups", "fastdpo-before", "speed_over", 3.5),
        ("pairs/s, TRL at its best", "fastdpo-groups", "trl-best", "speed_over", 10.0),
        ("peak memory, the build before", "fastdpo-groups", "fastdpo-before", "memory_over", 0.6),
    ],
    2: [("pairs/s, the build before", "fastdpo-cached", "fastdpo-before", "speed_over", 0.97)],
}
# And of pairs whose prompts begin with one system message.
_SYSTEM_BARS = [("pairs/s, the build before", "fastdpo-cached", "fastdpo-before", "speed_over", 1.3)]


def all_tables(found: dict[str, Any]) -> str:
    parts = [_heading(found), speed_table(found), _settings(found), tried_tables(found), profile_table(found)]
    return "\n\n".join(part for part in [*parts, bars_table(found), _failures(found)] if part)


def speed_table(found: dict[str, Any]) -> str:
    arms = _measured(found)
    peers = [name for name in ("trl", "trl-best", "trl-best+head", "fastdpo-before") if name in arms]
    rows = [["", "pairs/s", "with cache", *(f"x {name}" for name in peers), "s/step", "CPU s", "MB", "loss", "norm"]]
    for name, arm in arms.items():
        build, alone = arm["build_seconds"], 1 / arm["pairs_per_second"]
        with_cache = "-" if build is None else f"{1 / (alone + build):.3g}, {1 / (alone + build / 3):.3g}"
        rows.append(
            [
                name,
                f"{arm['pairs_per_second']:.3g}",
                with_cache,
                *(f"{arm['speed_over'][peer]:.2f}" for peer in peers),
                f"{arm['seconds']:.3g}",
                f"{arm['cpu_seconds']:.3g}",
                "-" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / 1e6:,.0f}",
                f"{arm['differences']['loss']:.1e}",
                f"{arm['differences']['grad_norm']:.1e}",
            ]
        )
    return align(rows) if arms else ""


def tried_tables(found: dict[str, Any]) -> str:
    """What each tuned arm tried, one run each: which settings matter."""
    parts = []
    for name, arm in found["arms"].items():
        tried = [one for one in arm.get("tried", ()) if "failed" not in one]
        if tried:
            rows = [[f"{name}, tried once", "pairs/s", "MB"]]
            for one in tried:
                memory = "-" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 1e6:,.0f}"
                rows.append(
                    [_setting(one["setting"]), f"{one.get('pairs', found['pairs']) / one['seconds']:.3g}", memory]
                )
            parts.append(align(rows))
    return "\n\n".join(parts)


def answers_tables(cases: list[dict[str, Any]]) -> str:
    """Each arm's step over the answers to a prompt, with the tokens that it takes; none where there is one number of
    answers alone."""
    cases = [found for found in cases if "counted" in found["data"]]
    parts = []
    for dtype, name in dict.fromkeys((found["dtype"], name) for found in cases for name in found["arms"]):
        steps = [(found, _measured(found).get(name)) for found in cases if found["dtype"] == dtype]
        rows = [_step(found, arm) for found, arm in steps if arm is not None]
        if len({row[0] for row in rows}) > 1:
            parts.append(align([[f"{name}, {dtype}", *_STEP], *rows]))
    return "\n\n".join(parts)


def _step(found: dict[str, Any], arm: dict[str, Any]) -> list[str]:
    profile = arm.get("profile") or dict.fromkeys(COUNTS)
    body, head = profile["policy_tokens"], profile["head_positions"]
    return [
        f"{found['answers']} answers",
        str(found["pairs"]),
        f"{found['data']['counted']['tokens'] / found['steps']:,.0f}",
        *("-" if count is None else f"{count:,.0f}" for count in (body, head)),
        f"{arm['seconds']:.3g}",
        "-" if body is None else f"{arm['seconds'] * 1e3 / body:.3g}",
        f"{arm['pairs_per_second']:.3g}",
    ]


def profile_table(found: dict[str, Any]) -> str:
    arms = {name: arm["profile"] for name, arm in _measured(found).items() if "profile" in arm}
    if not arms:
        return ""
    rows = [["", *(name.replace("_", " ") for name in COUNTS), *PARTS]]
    for name, profile in arms.items():
        rows.append([name, *(f"{profile[key]:,.0f}" for key in COUNTS), *(f"{profile[key]:.3g}" for key in PARTS)])
    return align(rows)


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What is to be shown, what was measured, and whether it holds."""
    arms = _measured(found)
    of_answers = _SYSTEM_BARS if found.get("system_tokens") else _ANSWERS_BARS.get(found.get("answers", 2), [])
    wanted = [*_BARS, *of_answers] if found.get("answers", 2) == 2 else of_answers
    known = [bar for bar in wanted if bar[1] in arms and bar[2] in arms[bar[1]].get(bar[3], {})]
    shown = []
    for what, name, peer, key, bound in known:
        value, least = arms[name][key][peer], key != "memory_over"
        holds = value >= bound if least else value <= bound
        shown.append(
            {"what": f"{name} over {peer}: {what}", "value": value, "bound": bound, "least": least, "holds": holds}
        )
    return shown


def bars_table(found: dict[str, Any]) -> str:
    rows = [
        [
            bar["what"],
            f"{bar['value']:.2f}",
            f"{'>=' if bar['least'] else '<='} {bar['bound']}",
            "yes" if bar["holds"] else "NO",
        ]
        for bar in bars(found)
    ]
    return align([["", "measured", "wanted", "holds"], *rows]) if rows else ""


def _measured(found: dict[str, Any]) -> dict[str, Any]:
    return {name: arm for name, arm in found["arms"].items() if arm["status"] == "measured"}


def _heading(found: dict[str, Any]) -> str:
    data = found["data"]
    sample, everything = data["sample"], data["all"]
    losses = [loss for arm in _measured(found).values() for loss in arm["rounds"][0]["losses"]]
    lines = [
        f"{found['name']}, {found['dtype']}, {found['optim']}: {found['steps']} steps of {found['pairs']} pairs, "
        f"at most {found['max_length']:,} tokens a sequence, {found['rounds']} rounds",
        f"{data['file'] or 'made-up pairs'}: {sample['rows']} of {everything['rows']} pairs; a pair has "
        f"{sample['tokens'] / sample['rows']:,.0f} tokens (all: {everything['tokens'] / everything['rows']:,.0f}), "
        f"{sample['prompt_share']:.0%} of them prompt (all: {everything['prompt_share']:.0%})",
    ]
    if found.get("answers", 2) > 2:
        pairs = found["answers"] * (found["answers"] - 1) // 2
        prompts = found["pairs"] // pairs
        lines.append(f"a step has {prompts} prompt{'s' * (prompts > 1)} with {found['answers']} answers each")
    if found.get("system_tokens"):
        lines.append(f"every prompt begins with the same system message of {found['system_tokens']} tokens")
    if losses:
        lines.append(
            f"losses from {min(losses):.4f} to {max(losses):.4f}; they may differ by {found['tolerance']['loss']:.1e}"
        )
    return "\n".join(lines)


def _settings(found: dict[str, Any]) -> str:
    arms = _measured(found).items()
    rows = [[name, f"{arm['about']}; {_setting(arm['setting'])}".rstrip("; ")] for name, arm in arms]
    return align(rows, left=True) if rows else ""


def _setting(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def _failures(found: dict[str, Any]) -> str:
    failed = [(name, arm) for name, arm in found["arms"].items() if arm["status"] == "failed"]
    return "\n".join(f"{name}: FAILED: {arm['reason']}" for name, arm in failed)
