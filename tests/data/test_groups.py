"""Rows of several answers to a prompt: what is read, which pairs are made, and what becomes of them as tokens."""

from __future__ import annotations

import json
import logging
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from toy_data import SENTENCES, assistant, make_tokenizer, text_rows, user, write_jsonl

from fastdpo.data import DataError, examine, load_preferences, prepare, prepare_stream
from fastdpo.data.comparisons import PAIRS, pairs_by, ranks_of
from fastdpo.data.groups import GroupTokens, lay_out
from fastdpo.data.rows import common_prefix_length
from fastdpo.data.tokens import Tokens
from fastdpo.data.truncation import cut

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")

TOKENIZER = make_tokenizer()
ANSWERS = [f" {sentence}" for sentence in SENTENCES]
ROW = {"prompt": "Say something:", "completions": ANSWERS[:4]}
BY_SCORE = {"weight_by_score": True}
CHAT = {"prompt": [user("Say something.")], "completions": [[assistant(text)] for text in ANSWERS[:4]]}


def made(rows: list[dict[str, Any]], **how: Any) -> tuple[Dataset, Any]:
    return prepare(Dataset.from_list(rows), TOKENIZER, **how)


def texts_of(row: dict[str, Any]) -> list[str]:
    return [TOKENIZER.decode(ids).removesuffix("</s>") for ids in row["completion_ids"]]


# ------------------------------------------------------------------------------------------- which pairs


@given(scores=st.lists(st.integers(0, 4), min_size=2, max_size=7))
def test_pairs_by_scores(scores: list[int]) -> None:
    count = len(scores)
    order = sorted(range(count), key=lambda i: -scores[i])
    by_hand = {
        "all": [(a, b) for a, b in combinations(order, 2)],
        "adjacent": [(order[i], order[i + 1]) for i in range(count - 1)],
        "best_vs_rest": [(order[0], b) for b in order[1:]],
        "best_worst": [(order[0], order[-1])],
    }
    assert set(by_hand) == set(PAIRS)
    for which, candidates in by_hand.items():
        pairs, ties = pairs_by(scores, which)
        assert pairs == [(a, b) for a, b in candidates if scores[a] != scores[b]]
        assert ties == sum(scores[a] == scores[b] for a, b in candidates)
        assert all(scores[a] > scores[b] for a, b in pairs)


def test_ranks_of_answers_that_are_left() -> None:
    assert ranks_of([3.0, 9.0, 1.0, 9.0], [0, 1, 2]) == [1.0, 0.0, 2.0]
    assert ranks_of([3.0, 9.0, 1.0, 9.0], [1, 2, 3]) == [] == ranks_of(None, [0, 1])


# ------------------------------------------------------------------------------------------- as tokens


@pytest.mark.parametrize("row", [ROW, CHAT])
@pytest.mark.parametrize(
    ("said", "how", "pairs", "weights"),
    [
        ({"ranks": [2, 1, 3, 4]}, {}, [(1, 0), (1, 2), (1, 3), (0, 2), (0, 3), (2, 3)], None),
        ({"scores": [0.5, 2, -1, 0]}, {"pairs": "adjacent"}, [(1, 0), (0, 3), (3, 2)], None),
        ({"scores": [0.5, 2, -1, 0]}, {"pairs": "best_vs_rest", **BY_SCORE}, [(1, 0), (1, 3), (1, 2)], [1.5, 2, 3]),
        ({"ranks": [2, 1, 3, 4]}, {"pairs": "best_worst", **BY_SCORE}, [(1, 3)], [3]),
        ({"pairs": [[2, 0], [2, 1]]}, {}, [(2, 0), (2, 1)], None),
        ({"pairs": [[2, 0], [2, 1], [0, 1]], "weights": [2, 0.5, 0]}, {}, [(2, 0), (2, 1)], [2, 0.5]),
    ],
)  # fmt: skip
def test_each_answer_once(
    row: dict[str, Any], said: dict[str, Any], how: dict[str, Any], pairs: list[tuple[int, int]], weights: Any
) -> None:
    """The same ids as those of the pairs by themselves."""
    rows, summary = made([row | said], **how)
    (group,) = rows
    texts = [text[0]["content"] if isinstance(text, list) else text for text in row["completions"]]
    used = sorted({i for pair in pairs for i in pair})
    one_by_one, _ = made(
        [
            {"prompt": row["prompt"], "chosen": row["completions"][a], "rejected": row["completions"][b]}
            for a, b in pairs
        ]
    )
    assert [group["prompt_ids"]] * len(pairs) == one_by_one["prompt_ids"]
    for (chosen, rejected), pair in zip(group["pairs"], one_by_one, strict=True):
        assert group["completion_ids"][chosen] == pair["chosen_ids"]
        assert group["completion_ids"][rejected] == pair["rejected_ids"]
    assert len(group["completion_ids"]) == len(used)
    assert [(used[a], used[b]) for a, b in group["pairs"]] == pairs
    if row is ROW:
        assert texts_of(group) == [texts[i] for i in used]
    assert group.get("pair_weights") == weights
    assert summary.groups.answers == len(used) and summary.groups.pairs == len(pairs)
    assert (summary.rows_in, summary.rows_kept) == (1, 1)


def test_ranks_are_there_where_no_two_answers_are_as_good() -> None:
    rows, _ = made([ROW | {"scores": [0.5, 2, -1, 0]}, ROW | {"scores": [1, 1, 0, 2]}])
    assert rows["ranks"] == [[1.0, 0.0, 3.0, 2.0], []]
    rows, _ = made([ROW | {"pairs": [[0, 1], [0, 2]]}])
    assert "ranks" not in rows.column_names
    rows, _ = made([ROW | {"pairs": [[2, 1]]}])  # one pair is an order of its two
    assert rows["ranks"] == [[1.0, 0.0]] and rows["pairs"] == [[[1, 0]]]


def test_what_is_left_out_is_counted() -> None:
    rows = [
        ROW | {"scores": [1, 1, 0, 1]},  # three ties
        ROW | {"scores": [1, 1, 1, 1]},  # all of them
        {"prompt": "Say:", "completions": [" one"], "scores": [1]},
        {"prompt": "Say:", "completions": [" one", " two", " one"], "scores": [3, 2, 1]},  # equal answers, one pair
        {"prompt": "Say:", "completions": [" one", " one"], "scores": [2, 1]},
        {"prompt": "Say:", "completions": [" one", "", " two"], "scores": [3, 2, 1]},  # two pairs of an empty one
        {"prompt": "Say:", "completions": ["", " two"], "scores": [2, 1]},
    ]
    kept, summary = made(rows)
    assert summary.dropped == {"empty_completion": 1, "one_answer": 1, "all_ties": 1, "equal_answers": 1}
    assert len(kept) == summary.rows_kept == 3 and summary.rows_in == 7
    assert summary.groups.left_out == {
        "two answers score alike": 3 + 6,
        "its two answers are equal": 1 + 1,
        "chosen or rejected is empty": 2 + 1,
    }
    # The equal ones are one answer, better and worse than the other one: as pairs say it.
    assert kept[1]["pairs"] == [[0, 1], [1, 0]]
    assert texts_of(kept[2]) == [" one", " two"] and kept[2]["pairs"] == [[0, 1]]
    console = Console(width=160, record=True)
    console.print(summary.table())
    said = console.export_text()
    assert re.search(r"pairs left out: two answers score alike +│ +9", said)
    assert re.search(r"answers, each once +│ +8 │ up to 4 to a prompt", said)
    assert "a batch's size counts groups" in said and "packed, each answer once" in said


def test_groups_that_say_a_thing_again_or_its_opposite() -> None:
    one = {"prompt": "Say:", "completions": [" one", " two", " three"]}
    rows = [
        one | {"pairs": [[0, 1], [0, 2]]},
        one | {"pairs": [[0, 1], [0, 2]]},
        one | {"pairs": [[1, 2]]},  # more, and not against it
        one | {"pairs": [[2, 1]]},
        one | {"pairs": [[0, 1], [1, 0]], "prompt": "Or say:"},
        one | {"pairs": [[1, 0]], "prompt": "Or else say:"},
    ]
    kept, summary = made(rows)
    assert len(kept) == 6 and summary.warned == {"duplicate": 1, "contradicted": 2}
    assert summary.first_rows == {"duplicate": [1], "contradicted": [3, 4]}


def test_the_work_of_a_step_by_hand() -> None:
    row = ROW | {"ranks": [1, 2, 3, 4]}
    rows, summary = made([row, row | {"prompt": "Or be silent:"}], batch_size=2)
    prompts = [len(group["prompt_ids"]) for group in rows]
    answers = [list(map(len, group["completion_ids"])) for group in rows]
    work = summary.work
    assert work.batch_size == 2 and work.pairs == 12
    assert work.packed_body == sum(prompts) + sum(map(sum, answers))
    assert work.packed_head == sum(map(sum, answers))
    assert work.pairs_head == 3 * sum(map(sum, answers))  # each answer is in three pairs
    assert work.pairs_body == 6 * sum(prompts) + 3 * sum(map(sum, answers))
    assert work.padded == 24 * max(prompt + max(lengths) for prompt, lengths in zip(prompts, answers, strict=True))


def test_max_length_cuts_and_drops_as_for_pairs() -> None:
    long = ROW | {"prompt": "Say something, and do not be brief about it:" * 3}
    rows = [row | {"ranks": [1, 2, 3, 4]} for row in (ROW, long)]
    whole, _ = made(rows)
    prompt = len(whole[0]["prompt_ids"])
    limit = prompt + min(map(len, whole[0]["completion_ids"])) - 1
    kept, summary = made(rows, max_length=limit)
    assert len(kept) == 1 and summary.dropped == {"prompt_too_long": 1}
    assert summary.truncated == {"answer": 4}
    assert kept[0]["completion_ids"] == whole[0]["completion_ids"]  # nothing is cut here
    alike = [{"prompt": "Say:", "completions": [" one two three", " one two four"], "ranks": [1, 2]}]
    _, summary = made(alike, max_length=len(TOKENIZER("Say: one")["input_ids"]))
    assert summary.warned == {"identical_after_truncation": 1}


def test_tools_turns_and_masks_go_the_way_of_pairs() -> None:
    turns = [[assistant("One."), user("More."), assistant(word)] for word in ("Two.", "Three.", "Four.")]
    row = {"prompt": [user("Count.")], "completions": turns, "ranks": [1, 2, 3], "tools": [{"name": "abacus"}]}
    ((group,), _), ((pair,), _) = (
        made([row]),
        made([{"prompt": row["prompt"], "chosen": turns[0], "rejected": turns[2], "tools": row["tools"]}]),
    )
    assert group["prompt_ids"] == pair["prompt_ids"] and "abacus" in TOKENIZER.decode(group["prompt_ids"])
    assert group["completion_ids"][0] == pair["chosen_ids"] and group["completion_mask"][2] == pair["rejected_mask"]
    assert 0 in group["completion_mask"][0]


MERGING = ["y over", "id", "unk", "our", " x"]  # with some of the prompts below, and not with others


@pytest.mark.parametrize("which", PAIRS)
def test_an_answer_that_merges_with_the_prompt(which: str) -> None:
    """It is scored as in its pairs by themselves; where these do not agree, from where it leaves the prompt."""
    rows = [
        {"prompt": prompt, "completions": MERGING, "scores": scores}
        for prompt in ("The sk", "The harb", "The sky is")
        for scores in ([5, 4, 3, 2, 1], [1, 2, 3, 4, 5], [3, 1, 5, 2, 4])
    ]
    kept, _ = made(rows, pairs=which)
    merged = disagreeing = 0
    for row, group in zip(rows, kept, strict=True):
        pairs, _ = pairs_by(row["scores"], which)
        alone, _ = made([{"prompt": row["prompt"], "chosen": MERGING[a], "rejected": MERGING[b]} for a, b in pairs])
        used = sorted({i for pair in pairs for i in pair})
        begin = TOKENIZER(row["prompt"])["input_ids"]
        found: dict[int, list[Any]] = {i: [] for i in used}
        for pair, ids in zip(pairs, alone, strict=True):
            for i, side in zip(pair, ("chosen", "rejected"), strict=True):
                found[i].append(cut(ids["prompt_ids"], ids[f"{side}_ids"], None, "keep_start"))
        masks = group.get("completion_mask") or [[]] * len(used)
        for i, ids, mask in zip(used, group["completion_ids"], masks, strict=True):
            whole, scored = cut(group["prompt_ids"], ids, None, "keep_start", mask)
            assert all(whole == theirs for theirs, _ in found[i])
            own = common_prefix_length(begin, whole)
            merged += own < len(begin)
            if all(theirs == found[i][0][1] for _, theirs in found[i]):
                assert scored == found[i][0][1]
            else:
                disagreeing += 1
                assert scored == [0] * own + [1] * (len(whole) - own)
    assert merged and (disagreeing or which == "best_worst")


def test_an_answer_that_begins_with_another_turn() -> None:
    """The beginning of an answer is context to those that begin with one."""
    answers = [[assistant("Up.")], [assistant("Down.")], [user("More."), assistant("Left.")]]
    row = {"prompt": [user("Count.")], "completions": answers, "ranks": [1, 2, 3]}
    (group,), _ = made([row])
    texts = []
    for ids, mask in zip(group["completion_ids"], group["completion_mask"], strict=True):
        assert TOKENIZER.decode(group["prompt_ids"]) == "<|user|>Count.<|end|>"
        texts.append([TOKENIZER.decode([i for i, m in zip(ids, mask, strict=True) if m == side]) for side in (0, 1)])
    assert texts == [
        ["<|assistant|>", "Up.<|end|>"],
        ["<|assistant|>", "Down.<|end|>"],
        ["<|user|>More.<|end|><|assistant|>", "Left.<|end|>"],
    ]


def test_prompts_that_part() -> None:
    """Were a prompt rendered otherwise beside another answer, each answer would keep its own as context."""
    group = GroupTokens(pairs=[(0, 1)])
    lay_out(group, [Tokens(prompt=[1, 2, 3], chosen=[9]), Tokens(prompt=[1, 5], chosen=[7, 8])])
    assert (group.prompt, group.completions) == ([1], [[2, 3, 9], [5, 7, 8]])
    assert group.masks == [[0, 0, 1], [0, 1, 1]]


# ------------------------------------------------------------------------------------------- what is read

RATINGS = zip("abcd", (3, 9, 3, 5), strict=True)
ULTRAFEEDBACK = {
    "instruction": "Say something.",
    "completions": [{"response": text, "overall_score": score} for text, score in RATINGS],
}
NECTAR = {
    "prompt": "\n\nHuman: Say something. \n\nAssistant: ",
    "answers": [{"answer": text, "rank": rank} for text, rank in zip("abc", (2, 1, 3), strict=True)],
}
NEMO = {
    "context": [user("Say something.")],
    "completions": [
        {"rank": rank, "completion": [assistant(text)]} for text, rank in zip("abc", (0, 1, 2), strict=True)
    ],
}
DISTILABEL = {"instruction": "Say something.", "generations": ["a", "b", "c"], "ratings": [1, 3, 2]}
OTHER_SIDES = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 0)
RATED = [
    {"prompt": "Say something.", "response": text, "helpfulness": score, **OTHER_SIDES}
    for text, score in zip("abc", (1, 2, 3), strict=True)
]


@pytest.mark.parametrize(
    ("rows", "scores"),
    [
        ([ULTRAFEEDBACK], [3.0, 9.0, 3.0, 5.0]),
        ([NECTAR], [-2.0, -1.0, -3.0]),
        ([NEMO], [0.0, -1.0, -2.0]),
        ([DISTILABEL], [1.0, 3.0, 2.0]),
        (RATED, [1.0, 2.0, 3.0]),
    ],
)
def test_public_sets_give_groups_when_asked(rows: list[dict[str, Any]], scores: list[float], tmp_path: Path) -> None:
    """And pairs of neighbours, as ever, when not."""
    file = str(write_jsonl(tmp_path / "answers.jsonl", rows))
    (group,) = load_preferences(file, groups=True)
    assert group["scores"] == scores and len(group["completions"]) == len(scores)
    pairs = load_preferences(file)
    ties = len(scores) - len(set(scores))
    assert "completions" not in pairs.column_names and len(pairs) == len(scores) - 1 - ties
    for dataset in (load_preferences(file, groups=True), Dataset.from_list(rows)):
        kept, summary = prepare(dataset, TOKENIZER, pairs="all")
        assert len(kept) == 1 and summary.groups.answers == len(scores)
        assert summary.groups.pairs == len(scores) * (len(scores) - 1) // 2 - ties
    kept, summary = prepare(Dataset.from_list(rows), TOKENIZER)
    assert summary.groups is None and len(kept) == len(pairs)


@pytest.mark.parametrize(
    "said", [{"ranks": [2, 1, 3, 4]}, {"scores": [1, 2, 0, -1]}, {"pairs": [[0, 1]], "weights": [2]}]
)
@pytest.mark.parametrize("row", [ROW, CHAT])
def test_a_file_of_groups_is_known(row: dict[str, Any], said: dict[str, Any], tmp_path: Path) -> None:
    rows = [row | said, row | said | {"prompt": row["prompt"], "source": "here"}]
    dataset = load_preferences(str(write_jsonl(tmp_path / "groups.jsonl", rows)))
    assert dataset[0] == row | said | {"source": None}
    assert dataset.info.description == "answers with ranks, scores or pairs"
    kept, summary = prepare(dataset, TOKENIZER)
    again, _ = made(rows)
    assert len(kept) == 2 and kept[:] == again[:] and summary.unused_columns == ["source"]


def test_pairs_and_groups_in_one_set_are_groups(tmp_path: Path) -> None:
    files = [
        str(write_jsonl(tmp_path / "groups.jsonl", [ROW | {"ranks": [1, 2, 3, 4]}])),
        str(write_jsonl(tmp_path / "pairs.jsonl", [text_rows(1)[0] | {"weight": 3}])),
    ]
    kept, summary = prepare(load_preferences(files), TOKENIZER)
    assert kept["pairs"][1] == [[0, 1]] and kept["pair_weights"] == [[1.0] * 6, [3.0]]
    assert summary.groups.pairs == 7


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1, "weight is -1; it should be at least 0."),
        (float("nan"), "weight[0]: needed a number, found nan"),
        ("heavy", "weight[0]: needed a number, found a string"),
        (1e308, "weight is 1e+308; it should be 0, or from 1e-37 to 1e+37"),
    ],
)
def test_weights_of_pairs_beside_groups(tmp_path: Path, weight: Any, message: str) -> None:
    groups = str(write_jsonl(tmp_path / "groups.jsonl", [ROW | {"ranks": [1, 2, 3, 4]}]))
    weights = [3, 0, weight]
    rows = [row | {"weight": w} for row, w in zip(text_rows(3), weights, strict=True)]
    if isinstance(weight, str):
        rows = rows[2:]
    with pytest.raises(DataError, match=re.escape(message)):
        prepare(load_preferences([groups, str(write_jsonl(tmp_path / "pairs.jsonl", rows))]), TOKENIZER)
    if isinstance(weight, str):
        return
    kept, summary = prepare(load_preferences([groups, str(write_jsonl(tmp_path / "two.jsonl", rows[:2]))]), TOKENIZER)
    assert kept["pair_weights"] == [[1.0] * 6, [3.0]] and summary.dropped == {"no_weight": 1}


WRONG = [
    (ROW, "answers to a prompt, with none of the columns 'ranks', 'scores' and 'pairs'"),
    (ROW | {"ranks": [1, 2, 3]}, "row 0, ranks: needed a list of 4 numbers, one for each of completions, found 3."),
    (ROW | {"ranks": [1, 2, 3, None]}, "row 0, ranks[3]: needed a number, found null."),
    (ROW | {"scores": [1, 2, 3, float("nan")]}, "row 0, scores[3]: needed a number"),
    (
        ROW | {"scores": [1, 2, 3, 4], "ranks": [4, 3, 2, 1]},
        "row 0: it has ranks and scores; give the one that is meant.",
    ),
    (ROW | {"pairs": [[0, 4]]}, "row 0, pairs[0] is [0, 4], and there are 4 answers, counted from 0."),
    (ROW | {"pairs": [[0, -1]]}, "row 0, pairs[0] is [0, -1]"),
    (ROW | {"pairs": [[0, 0]]}, "row 0, pairs[0] compares answer 0 with itself."),
    (ROW | {"pairs": [[0]]}, "row 0, pairs[0]: needed [chosen, rejected]"),
    (ROW | {"pairs": [[0, 1]], "weights": [-1]}, "row 0, weights[0] is -1; it should be at least 0."),
    (ROW | {"pairs": [[0, 1]], "weights": [1, 2]}, "row 0, weights: needed a list of 1 numbers, one for each of pairs"),
    (ROW | {"ranks": [1, 2, 3, 4], "weights": [1]}, "row 0: it has weights, which are those of pairs, but no pairs."),
    (
        ROW | {"pairs": [[0, 1]], "weights": [1e308]},
        "row 0, weights[0] is 1e+308; it should be 0, or from 1e-37 to 1e+37",
    ),
    (ROW | {"ranks": [1, 2, 3, 4], "weight": 2.0}, "row 0: it has answers and a 'weight', which is a pair's"),
    ({"prompt": "Say:", "completions": [[1], [2]], "ranks": [1, 2]}, "row 0, completions[0]: each message must be"),
    (
        {"prompt": "Say:", "completions": [[user("Up")], [{"role": "user"}, {"say": "it"}]], "pairs": [[0, 1]]},
        "row 0, completions[1]: each message must be",
    ),
]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_what_a_row_may_not_say(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        made([row])


def test_numbers_beyond_every_float(tmp_path: Path) -> None:
    rows = [ROW | {"scores": [1, 2, 3, 10**400]}]
    with pytest.raises(DataError, match=re.escape("row 0, scores[3]: needed a number")):
        prepare(load_preferences(str(write_jsonl(tmp_path / "groups.jsonl", rows))), TOKENIZER)
    with pytest.raises(DataError, match="row 0, the difference of scores 0 and 3 is inf; it should be 0, or from"):
        made([ROW | {"scores": [1e308, 2.0, 3.0, -1e308]}], pairs="best_worst", weight_by_score=True)


def test_what_does_not_go_together() -> None:
    for how in ({"pairs": "all"}, {"weight_by_score": True}):
        with pytest.raises(
            DataError, match=re.escape(f"{next(iter(how))} is given (--{next(iter(how))}), and these rows are pairs")
        ):
            made(text_rows(2), **how)
    with pytest.raises(DataError, match="joins pairs, and these rows are groups"):
        made([ROW | {"ranks": [1, 2, 3, 4]}], group_by_prompt=True)
    with pytest.raises(DataError, match="row 0: it says its pairs itself, and pairs='all' \\(--pairs\\) would"):
        made([ROW | {"pairs": [[0, 1]]}], pairs="all")
    with pytest.raises(DataError, match="row 0: weight_by_score is on, and the row has no scores"):
        made([ROW | {"pairs": [[0, 1]]}], weight_by_score=True)
    with pytest.raises(
        ValueError, match="pairs is 'best'; it should be one of all, adjacent, best_vs_rest, best_worst"
    ):
        made([ROW | {"ranks": [1, 2, 3, 4]}], pairs="best")
    with pytest.raises(DataError, match="No row is left of 1. 1 dropped because all of its answers score alike"):
        made([ROW | {"scores": [1, 1, 1, 1]}])


# ------------------------------------------------------------------------------------------- weights of pairs


def test_the_weight_of_a_pair() -> None:
    rows = [row | {"weight": weight} for row, weight in zip(text_rows(4), (1, 0.5, 0, 2), strict=True)]
    kept, summary = made(rows)
    assert kept["weight"] == [1.0, 0.5, 2.0] and summary.dropped == {"no_weight": 1}
    assert summary.unused_columns == []
    assert made([row | {"weight": 2} for row in text_rows(2)])[0]["weight"] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1.0, "row 1, weight: it is -1.0; it should be a finite number, at least 0"),
        (float("inf"), "row 1, weight: it is inf"),
        (None, "row 1, weight: it is None"),
        (1e308, "row 1, weight: it is 1e+308; it should be 0, or from 1e-37 to 1e+37"),
        (5e-324, "row 1, weight: it is 4.94066e-324; it should be 0"),
    ],
)
def test_weights_that_are_none(weight: float | None, message: str) -> None:
    rows = [row | {"weight": value} for row, value in zip(text_rows(2), (1.0, weight), strict=True)]
    with pytest.raises(DataError, match=re.escape(message)):
        made(rows)
    with pytest.raises(DataError, match="column 'weight' has type"):
        made([row | {"weight": "heavy"} for row in text_rows(2)])


# ------------------------------------------------------------------------------------------- pairs of one prompt

PAIRS_OF_TWO = [
    {"prompt": "One:", "chosen": " a", "rejected": " b", "weight": 1.0},
    {"prompt": "Two:", "chosen": " a", "rejected": " b", "weight": 1.0},
    {"prompt": "One:", "chosen": " a", "rejected": " c", "weight": 2.0},
    {"prompt": "One:", "chosen": " c", "rejected": " c", "weight": 1.0},
    {"prompt": "One:", "chosen": " b", "rejected": " c", "weight": 3.0},
]


def test_pairs_of_one_prompt_are_a_group() -> None:
    kept, summary = made(PAIRS_OF_TWO, group_by_prompt=True)
    assert [texts_of(group) for group in kept] == [[" a", " b", " c"], [" a", " b"]]
    assert kept["pairs"] == [[[0, 1], [0, 2], [1, 2]], [[0, 1]]]
    assert kept["pair_weights"] == [[1.0, 2.0, 3.0], [1.0]]
    facts = summary.groups
    assert (facts.groups, facts.answers, facts.pairs, facts.most_answers) == (2, 5, 4, 3)
    assert facts.left_out == {"its two answers are equal": 1}
    assert (summary.rows_in, summary.rows_kept) == (5, 5) and summary.warned["identical"] == 1


def test_reference_log_probabilities_go_with_their_answers() -> None:
    rows = [
        row | {"ref_chosen_logps": -1.5, "ref_rejected_logps": -float(i)} for i, row in enumerate(PAIRS_OF_TWO[:3], 2)
    ]
    kept, _ = made(rows, group_by_prompt=True)
    assert kept["ref_completion_logps"] == [[-1.5, -2.0, -4.0], [-1.5, -3.0]]
    rows[2]["ref_chosen_logps"] = -1.0
    with pytest.raises(DataError, match="one answer has two reference log-probabilities, -1.5 and -1;"):
        made(rows, group_by_prompt=True)


def test_a_stream_groups_within_a_chunk(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def stream(rows: list[dict[str, Any]]) -> IterableDataset:
        return IterableDataset.from_generator(lambda: iter(rows))

    expected, _ = made(PAIRS_OF_TWO, group_by_prompt=True)
    with caplog.at_level(logging.ERROR):
        rows = list(prepare_stream(stream(PAIRS_OF_TWO), TOKENIZER, group_by_prompt=True))
    for ours, theirs in zip(rows, expected, strict=True):
        assert {name: ours[name] for name in theirs} == theirs
    groups = [ROW | {"scores": [4, 3, 2, 1]}, ROW | {"scores": [1, 2, 2, 0]}]
    expected, _ = made(groups, pairs="adjacent")
    rows = list(prepare_stream(stream(groups), TOKENIZER, pairs="adjacent"))
    for ours, theirs in zip(rows, expected, strict=True):
        assert {name: ours[name] for name in theirs} == theirs
    monkeypatch.setattr("fastdpo.data.streaming.CHUNK", 2)
    rows = list(prepare_stream(stream(PAIRS_OF_TWO), TOKENIZER, group_by_prompt=True))
    assert [len(row["pairs"]) for row in rows] == [1, 1, 1, 1]  # one chunk has two pairs of one prompt


def test_examined_groups_have_their_fate() -> None:
    tokenised, kept, summary = examine(
        Dataset.from_list([ROW | {"scores": [1, 1, 1, 1]}, ROW | {"scores": [4, 3, 2, 1]}]), TOKENIZER
    )
    assert tokenised["drop"] == ["all_ties", ""] and kept.tolist() == [1]
    assert summary.lengths["answer"].max == max(map(len, tokenised[1]["completion_ids"]))
    json.dumps(summary.as_dict())
