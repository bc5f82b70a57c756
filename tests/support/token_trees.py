"""Random batches whose sequences have beginnings in common, at any depth."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

# Few, so that sequences often go on alike; and equal ones, and ones that end within others, are common.
TOKENS = st.integers(3, 5)


@st.composite
def texts(draw: st.DrawFn, *, min_size: int = 0) -> list[int]:
    """A long run, or a few tokens that are likely to be another's."""
    if draw(st.booleans()):
        return [draw(st.integers(3, 40))] * draw(st.integers(max(min_size, 1), 9)) + draw(st.lists(TOKENS, max_size=3))
    return draw(st.lists(TOKENS, min_size=min_size, max_size=6))


@st.composite
def pair_rows(draw: st.DrawFn, system: list[int]) -> dict[str, Any]:
    """As prepare makes them: where there is no prompt, a completion has two tokens at least."""
    prompt = (system if draw(st.booleans()) else []) + draw(texts())
    sides = {side: draw(texts(min_size=1 if prompt else 2)) for side in ("chosen", "rejected")}
    row = {"prompt_ids": prompt, **{f"{side}_ids": ids for side, ids in sides.items()}}
    if draw(st.booleans()):
        row |= {f"{side}_mask": draw(masks(ids, prompt)) for side, ids in sides.items()}
    if draw(st.booleans()):
        row["weight"] = draw(st.floats(0.1, 3))
    return row


@st.composite
def masks(draw: st.DrawFn, ids: list[int], prompt: list[int]) -> list[int]:
    """Of a completion; at least one token that has a predecessor is scored."""
    mask = draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    mask[draw(st.integers(0 if prompt else 1, len(ids) - 1))] = 1
    return mask


@st.composite
def group_rows(draw: st.DrawFn, system: list[int]) -> dict[str, Any]:
    """1 to 7 answers; some in no pair, some twice in the row, some in the other's place."""
    prompt = (system if draw(st.booleans()) else []) + draw(texts())
    answers = draw(st.lists(texts(min_size=1 if prompt else 2), min_size=1, max_size=7))
    places = st.integers(0, len(answers) - 1)
    row = {
        "prompt_ids": prompt,
        "completion_ids": answers,
        "pairs": draw(st.lists(st.lists(places, min_size=2, max_size=2), min_size=1, max_size=6)),
    }
    if draw(st.booleans()):
        row["completion_mask"] = [draw(masks(ids, prompt)) for ids in answers]
    if draw(st.booleans()):
        row["pair_weights"] = [draw(st.floats(0.1, 3)) for _ in row["pairs"]]
    return row


@st.composite
def batches(draw: st.DrawFn, max_rows: int = 3) -> list[dict[str, Any]]:
    system = draw(texts(min_size=1))
    return draw(st.lists(pair_rows(system) | group_rows(system), min_size=1, max_size=max_rows))


def pairs_in(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's pairs as pair rows."""
    if "completion_ids" not in row:
        return [row]
    ids, masks_of = row["completion_ids"], row.get("completion_mask")
    weights = row.get("pair_weights") or [1.0] * len(row["pairs"])
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": ids[chosen],
            "rejected_ids": ids[rejected],
            "weight": weight,
            **({"chosen_mask": masks_of[chosen], "rejected_mask": masks_of[rejected]} if masks_of else {}),
        }
        for (chosen, rejected), weight in zip(row["pairs"], weights, strict=True)
    ]
