"""What a run takes of the rows that it is given: rankings, groups and pairs side by side, streamed or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from float64 import KeepFloat64
from tiny_models import make_model
from toy_data import SENTENCES, make_tokenizer, text_rows
from trainer_runs import config, make_trainer

from fastdpo.data import DataError
from fastdpo.data import streaming as streams
from fastdpo.data.stream_start import LOOKED_AT

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = make_tokenizer()
RANKED: dict[str, Any] = {"loss_type": "plackett_luce", "beta": 0.5}


def groups(count: int, **said: Any) -> list[dict[str, Any]]:
    """Prompts with three answers each, scored in no order, or what is said of them instead."""
    rows = []
    for number in range(count):
        answers = [f" {SENTENCES[(number + i) % len(SENTENCES)]} {i}" for i in range(3)]
        row = {"prompt": f"Say something, {number}:", "completions": answers}
        rows.append(row | (said or {"scores": [float((2 * i + number) % 5) for i in range(3)]}))
    return rows


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        yield from rows

    return IterableDataset.from_generator(generate)


def logp(model: Any, prompt: list[int], answer: list[int]) -> float:
    logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return float(logps[places, torch.tensor(answer)].sum())


def expected(rows: list[dict[str, Any]]) -> float:
    """The mean Plackett-Luce loss of tokenised rows, of which a pair is a ranking of two."""
    models = [make_model("qwen3", seed=seed, dtype=torch.float64) for seed in (1, 2)]
    losses = []
    for row in rows:
        sides = [row["chosen_ids"], row["rejected_ids"]] if "chosen_ids" in row else row["completion_ids"]
        ranks = row.get("ranks", [0, 1])
        answers = [sides[i] for i in sorted(range(len(sides)), key=ranks.__getitem__)]
        policy, reference = ([logp(model, row["prompt_ids"], answer) for answer in answers] for model in models)
        rewards = RANKED["beta"] * torch.tensor([policy, reference], dtype=torch.float64).diff(dim=0)[0].neg()
        losses.append(sum(rewards[k:].logsumexp(0) - rewards[k] for k in range(len(rewards))))
    return float(sum(losses)) / len(losses)


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_a_pair_beside_groups_is_a_ranking_of_two(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stream, whose windows may hold pairs alone: their rows come into one batch with groups."""
    monkeypatch.setattr(streams, "CHUNK", 3)
    rows = [*text_rows(4), *groups(3)]
    with KeepFloat64():
        trainer = make_trainer(
            tmp_path,
            TOKENIZER,
            model=make_model("qwen3", seed=1, dtype=torch.float64),
            ref_model=make_model("qwen3", seed=2, dtype=torch.float64),
            train_dataset=stream(rows),
            packing=packing,
            gradient_checkpointing=False,
            **RANKED,
        )
        tokenised = list(trainer.train_dataset)
        assert {"chosen_ids" in row for row in tokenised} == {True, False}
        batch = trainer._prepare_inputs(trainer.data_collator(tokenised))
        with torch.no_grad():
            losses, per_pair = trainer.pair_losses(trainer.model, batch)
            wanted = expected(tokenised)
    assert trainer.weight_of(batch) == float(per_pair["weight"].sum()) == len(rows)
    assert float(losses.sum()) / len(rows) == pytest.approx(wanted, rel=1e-12)


def test_the_reference_in_columns_of_pairs_beside_groups(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TOKENIZER, train_dataset=Dataset.from_list(groups(2)), **RANKED)
    group = trainer.train_dataset[0] | {"ref_completion_logps": [-7.0, -8.0, -9.0]}
    pair = {"prompt_ids": [9, 8], "chosen_ids": [11, 12], "rejected_ids": [13]}
    rows = [pair | {"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}, group]
    (part,) = trainer.data_collator(rows)["micro_batches"]
    said = trainer._reference.sums(trainer.model, part)
    assert said is not None and said.flatten().tolist() == [-3, -4, -7, -8, -9]


def test_rankings_of_a_stream(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is refused, and said, of rows that are at hand is of a stream's."""

    def trained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        trainer = make_trainer(tmp_path, TOKENIZER, train_dataset=stream(rows), **RANKED)
        return list(trainer.train_dataset)

    tied = groups(1, scores=[1.0, 1.0, 0.0])
    assert len(trained(groups(2) + tied)) == 2
    assert "in which two answers are as good, or that have no ranks, are left out" in caplog.text
    with pytest.raises(DataError, match="the train dataset has weights of pairs"):
        trained(groups(2, pairs=[[0, 1]], weights=[3.0]))
    for rows in (tied, groups(2, pairs=[[0, 1], [0, 2]])):
        with pytest.raises(DataError, match="plackett_luce needs an order of all answers of a row"):
            trained(rows)


def test_rankings_of_a_long_stream_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read to its end."""
    monkeypatch.setattr("fastdpo.trainer.datasets.CHUNK", 4)
    monkeypatch.setattr(streams, "CHUNK", 2)
    asked: list[int] = []

    def generate() -> Iterator[dict[str, Any]]:
        for number in range(10_000):
            asked.append(number)
            yield groups(1, pairs=[[0, 1], [0, 2]])[0]

    with pytest.raises(DataError, match="plackett_luce needs an order of all answers of a row"):
        make_trainer(tmp_path, TOKENIZER, train_dataset=IterableDataset.from_generator(generate), **RANKED)
    assert len(asked) <= LOOKED_AT + 4  # for everyone who looks at the first rows, and a chunk


NECTAR = [
    {
        "prompt": f"\n\nHuman: Which way, {number}?\n\nAssistant: ",
        "answers": [{"answer": SENTENCES[i], "rank": float(i + 1)} for i in range(4)],
    }
    for number in range(3)
]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loss_of_rankings_is_of_whole_ones(streamed: bool, tmp_path: Path) -> None:
    """Whatever their format: they are not taken apart to pairs of neighbours, of which the loss would be another."""
    rows = stream(NECTAR) if streamed else Dataset.from_list(NECTAR)
    trainer = make_trainer(tmp_path, TOKENIZER, train_dataset=rows, **RANKED)
    assert [row["ranks"] for row in trainer.train_dataset] == [[0, 1, 2, 3]] * 3
    assert [len(row["pairs"]) for row in trainer.train_dataset] == [6] * 3
    for which in ("adjacent", "best_vs_rest", "best_worst"):
        with pytest.raises(ValueError, match=re.escape(f"pairs is '{which}', and loss_type 'plackett_luce' is a loss")):
            config(tmp_path, pairs=which, **RANKED)


def test_what_is_asked_of_groups_is_not_asked_of_pairs_to_evaluate_on(tmp_path: Path) -> None:
    """And the other way round. Rows to train on have to be what is asked for."""
    rows, pairs = Dataset.from_list(groups(3)), Dataset.from_list(text_rows(3))
    how = {"pairs": "best_worst", "weight_by_score": True}
    trainer = make_trainer(tmp_path, TOKENIZER, train_dataset=rows, eval_dataset={"a": rows, "b": pairs}, **how)
    assert [len(group) for group in trainer.eval_dataset["a"]["pairs"]] == [1] * 3
    assert "chosen_ids" in trainer.eval_dataset["b"].column_names
    joined = Dataset.from_list([text_rows(1)[0] | {"chosen": f" {i}"} for i in range(3)])
    trainer = make_trainer(tmp_path, TOKENIZER, train_dataset=joined, eval_dataset=rows, group_by_prompt=True)
    assert len(trainer.train_dataset) == 1 and len(trainer.eval_dataset) == 3
    with pytest.raises(DataError, match=r"pairs is given \(--pairs\), and these rows are pairs already"):
        make_trainer(tmp_path, TOKENIZER, train_dataset=pairs, eval_dataset=rows, **how)


def test_a_stream_of_groups_and_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one window, and in windows of pairs alone after groups."""
    monkeypatch.setattr(streams, "CHUNK", 4)
    rows = [*groups(2), *text_rows(8)]
    trainer = make_trainer(tmp_path, TOKENIZER, train_dataset=stream(rows), pairs="best_worst", weight_by_score=True)
    found = list(trainer.train_dataset)
    assert len(found) == len(rows) and all(len(row.get("pairs", [()])) == 1 for row in found)
    at_hand = Dataset.from_list([{"chosen": None, "rejected": None} | rows[0], *rows[1:]])
    whole = make_trainer(tmp_path, TOKENIZER, train_dataset=at_hand, pairs="all").train_dataset
    assert [len(group) for group in whole["pairs"]] == [len(list(combinations(range(3), 2)))] * 2 + [1] * 8
