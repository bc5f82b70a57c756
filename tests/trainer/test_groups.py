"""Runs on rows of several answers: the steps of their pairs by themselves, weights, rankings, and what is logged."""

from __future__ import annotations

import functools
import os
import socket
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import differences, run
from datasets import Dataset
from float64 import KeepFloat64
from processes import spawn
from tiny_families import make_family
from tiny_models import make_model
from token_trees import pairs_in
from torch import Tensor
from toy_data import SENTENCES, make_tokenizer, text_rows
from trainer_runs import METRICS, GradientRecorder, config, make_trainer

from fastdpo.data import DataError, PreferenceCollator, prepare
from fastdpo.errors import InputError
from fastdpo.loss.oracle import Completion, ranking_losses

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = make_tokenizer()
SIZES = (4, 2, 3, 4)
FLOAT32 = 1e-6  # Trainer's sum of the losses is no wider
RANKED = {"rewards/top1", "rewards/kendall_tau"}


def groups() -> list[dict[str, Any]]:
    """Prompts with 2 to 4 answers, in no order of how good they are."""
    rows = []
    for number, size in enumerate(SIZES):
        answers = [f" {SENTENCES[(number + i) % len(SENTENCES)]} {i}" for i in range(size)]
        row = {"prompt": f"Say something, {number}:", "completions": answers}
        rows.append(row | {"scores": [float((i * 3 + number) % 5) for i in range(size)]})
    return rows


def pairs_of(rows: list[dict[str, Any]], weighted: bool = False) -> list[dict[str, Any]]:
    """All pairs of the groups, one a row."""
    found = []
    for row in rows:
        order = sorted(range(len(row["scores"])), key=lambda i: -row["scores"][i])
        for a, b in combinations(order, 2):
            pair = {"prompt": row["prompt"], "chosen": row["completions"][a], "rejected": row["completions"][b]}
            found.append(pair | ({"weight": row["scores"][a] - row["scores"][b]} if weighted else {}))
    return found


def train(folder: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """One step on all rows, with a reference that is another model, in float64."""
    recorder = GradientRecorder()
    own = {
        "per_device_train_batch_size": len(rows),
        "per_device_eval_batch_size": 3,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
    }
    make = options.pop("make", functools.partial(make_model, "qwen3", dtype=torch.float64))
    models = {"model": make(seed=1)}
    if options.pop("has_reference", True):
        models["ref_model"] = make(seed=2)
    with KeepFloat64(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="policy and reference do not agree")
        trainer = make_trainer(
            folder,
            TOKENIZER,
            train_dataset=options.pop("dataset", None) or Dataset.from_list(rows),
            eval_dataset=options.pop("eval_dataset", None) or Dataset.from_list(rows),
            callbacks=[recorder],
            **(models | own | options),
        )
        start = trainer.evaluate() if "loss_type" in options else None
        trainer.train()
        metrics = trainer.evaluate()
    return {
        "start": start,
        "trainer": trainer,
        "gradients": recorder.steps[0],
        "metrics": metrics,
        "log": trainer.state.log_history[0],
    }


def assert_same(
    got: dict[str, Any], expected: dict[str, Any], *, but: set[str] = frozenset(), rtol: float = 1e-12
) -> None:
    # Where all cancels, as in a key's bias under softmax, rounding errors are left.
    least = 1e-14 * max(gradient.norm() for gradient in expected["gradients"].values())
    for name, gradient in expected["gradients"].items():
        assert (got["gradients"][name] - gradient).norm() <= rtol * gradient.norm() + least, name
    for name in {*METRICS, "loss"} - but:
        logged = FLOAT32 if name == "loss" else rtol
        assert got["log"][name] == pytest.approx(expected["log"][name], rel=logged), name
        assert got["metrics"][f"eval_{name}"] == pytest.approx(expected["metrics"][f"eval_{name}"], rel=1e-12), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": "repeated", "max_tokens_per_batch": 120},
        {"max_tokens_per_batch": 120},
        {"weight_by_score": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"weight_by_score": True, "sft_reduction": "batch", "sft_weight": 0.5},
        {"weight_by_score": True, "ld_alpha": 0.3},
        {"ld_alpha": 0.3, "use_weighting": True, "packing": "padded"},
        {"loss_type": "aot"},
        {"max_length": 24, "truncation_mode": "keep_end"},
        {"loss_type": "simpo", "has_reference": False},
    ],
)  # fmt: skip
def test_groups_are_their_pairs(tmp_path: Path, options: dict[str, Any]) -> None:
    """In float64: loss, gradients and metrics of a step on groups are those of one on all of their pairs, padded."""
    ours = train(tmp_path, groups(), **options)
    by_size = {"per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch", "packing"}
    same = {name: value for name, value in options.items() if name not in by_size and name != "weight_by_score"}
    theirs = train(tmp_path, pairs_of(groups(), options.get("weight_by_score", False)), packing="padded", **same)
    # What is sorted, or counted, over an evaluation batch depends on what is in it.
    whole = {"loss"} if "aot" in str(options) or options.get("sft_reduction") == "batch" else set()
    assert_same(ours, theirs, but=whole)
    assert {*ours["log"]} >= RANKED and not {*theirs["log"]} & RANKED
    counts = ours["log"]["pairs_per_second"], theirs["log"]["pairs_per_second"]
    assert min(counts) > 0


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_oss")
ANSWERS = [[20, 21, 22, 23, 24], [20, 21, 22], [20], [30, 31], [20, 21, 22], [40, 41, 42, 43], [50]]


def id_groups() -> Dataset:
    """2 to 7 answers: equal ones, ones that others begin with, and from three on one in no pair."""
    rows = []
    for size in range(2, len(ANSWERS) + 1):
        pairs = [[0, 1]] if size == 2 else [*([i, i + 1] for i in range(size - 2)), [size - 2, 0]]
        row = {"prompt_ids": [7, 8, 9, *[10 + size] * (1 + size % 3)], "completion_ids": ANSWERS[:size]}
        rows.append(row | {"pairs": pairs, "pair_weights": [0.5 + i for i in range(len(pairs))]})
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "family",
    [name if name == "gemma2" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_groups_are_their_pairs_in_every_family(tmp_path: Path, family: str) -> None:
    """In micro-batches of rows that have other numbers of pairs, and windows that are shorter than the rows."""
    groups = id_groups()
    pairs = Dataset.from_list([pair for row in groups for pair in pairs_in(row)])
    # A load-balancing loss is not of pairs, and counts what is laid out.
    of_family = {"router_aux_loss_coef": 0.0} if family == "gpt_oss" else {}
    how = {"make": functools.partial(make_family, family, length=6, trained=True, dtype=torch.float64, **of_family)}
    own = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    ours = train(tmp_path, [], dataset=groups, eval_dataset=groups, **own, **how)
    own = {"per_device_train_batch_size": len(pairs), "packing": "padded"}
    theirs = train(tmp_path, [], dataset=pairs, eval_dataset=pairs, **own, **how)
    assert len(pairs) == 21 and ours["trainer"].data_collator.layout == "shared"
    assert_same(ours, theirs)


def test_the_collator_without_parts(tmp_path: Path) -> None:
    """As with several processes, where a batch of padded rows is one micro-batch."""
    rows = prepare(Dataset.from_list(groups()), TOKENIZER)[0]
    batch = PreferenceCollator(0)(list(rows))
    assert batch["input_ids"].shape[0] == sum(SIZES) and batch["pairs"].shape == (16, 2)
    assert batch["pair_rows"].tolist() == [0] * 6 + [1] + [2] * 3 + [3] * 6
    assert "pair_weights" not in batch and batch["rankings"].shape == (4, 4)
    ours = train(tmp_path, groups(), data_collator=PreferenceCollator(0))
    assert_same(ours, train(tmp_path, groups(), packing="padded"))


def test_pairs_of_one_prompt_as_groups(tmp_path: Path) -> None:
    rows = pairs_of(groups(), weighted=True)
    ours = train(tmp_path, rows, group_by_prompt=True)
    assert len(ours["trainer"].train_dataset) == len(SIZES)
    assert_same(ours, train(tmp_path, rows, packing="padded"))


def expected_rankings(folder: Path, rows: list[dict[str, Any]], beta: float) -> tuple[float, dict[str, Tensor]]:
    """The mean Plackett-Luce loss of groups and its gradients, from full logits."""
    models = [make_model("qwen3", seed=seed, dtype=torch.float64) for seed in (1, 2)]
    prepared = prepare(Dataset.from_list(rows), TOKENIZER)[0]
    rankings = []
    for row in prepared:
        order = sorted(range(len(row["ranks"])), key=row["ranks"].__getitem__)
        ranking = []
        for i in order:
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"][i]])
            logps = []
            for model in models:
                logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                of_tokens = logits.gather(1, ids[0, 1:, None]).squeeze(1)
                logps.append(of_tokens[len(row["prompt_ids"]) - 1 :])
            ranking.append(Completion(logps[0].unbind(), logps[1].detach().unbind()))
        rankings.append(ranking)
    loss = torch.stack(ranking_losses(rankings, beta=beta)).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in models[0].named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": "padded"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"max_tokens_per_batch": 120, "packing": "repeated"},
    ],
)
def test_plackett_luce(tmp_path: Path, options: dict[str, Any]) -> None:
    with KeepFloat64():
        loss, gradients = expected_rankings(tmp_path, groups(), 0.5)
    ours = train(tmp_path, groups(), loss_type="plackett_luce", beta=0.5, **options)
    assert ours["log"]["loss"] == pytest.approx(loss, rel=FLOAT32)
    assert ours["start"]["eval_loss"] == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        assert (ours["gradients"][name] - gradient).norm() <= 1e-12 * gradient.norm(), name
    as_pairs = train(tmp_path, groups(), beta=0.5)
    for name in {*METRICS, *RANKED}:
        assert ours["log"][name] == pytest.approx(as_pairs["log"][name], rel=1e-12), name


def test_plackett_luce_of_pairs_is_sigmoid(tmp_path: Path) -> None:
    rows = text_rows(4)
    assert_same(train(tmp_path, rows, loss_type="plackett_luce"), train(tmp_path, rows))


def test_what_plackett_luce_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    how = {"loss_type": "plackett_luce", "max_steps": 1}

    def trainer(rows: list[dict[str, Any]], **more: Any) -> Any:
        return make_trainer(tmp_path, TOKENIZER, train_dataset=Dataset.from_list(rows), **how, **more)

    row = groups()[0]
    tied = row | {"scores": [1.0, 1.0, 0.0, 2.0]}
    assert len(trainer([row, tied]).train_dataset) == 1
    assert "1 of 2 rows of the train dataset are left out: two answers are as good" in caplog.text
    with pytest.raises(DataError, match="plackett_luce needs an order of all answers of a row"):
        trainer([tied])
    said = {name: value for name, value in row.items() if name != "scores"}
    with pytest.raises(DataError, match="has weights of pairs, and loss_type plackett_luce is of rankings"):
        trainer([said | {"pairs": [[0, 1]], "weights": [2.0]}])
    for name in ("weight_by_score", "group_by_prompt"):
        with pytest.raises(ValueError, match=f"{name} is on, and loss_type 'plackett_luce' is a loss of rankings"):
            config(tmp_path, **how, **{name: True})


def test_top1_and_kendall_tau_are_means_over_groups(tmp_path: Path) -> None:
    """From the rewards that the metrics of pairs are made of."""
    ours = train(tmp_path, groups())
    rows = pairs_of(groups())
    trainer = ours["trainer"]
    with KeepFloat64():
        batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
        _, per_pair = trainer.pair_losses(trainer.model, batch)
    margins = per_pair["margin"].tolist()
    assert len(margins) == len(rows)
    taus, tops, begin = [], [], 0
    for size in SIZES:
        own = margins[begin : begin + size * (size - 1) // 2]
        begin += len(own)
        taus.append(sum(1 if margin > 0 else -1 for margin in own) / len(own))
        tops.append(float(all(margin > 0 for margin in own[: size - 1])))
    with KeepFloat64(), torch.no_grad():
        again = trainer.evaluate()
    assert again["eval_rewards/kendall_tau"] == pytest.approx(sum(taus) / len(taus))
    assert again["eval_rewards/top1"] == pytest.approx(sum(tops) / len(tops))


def test_reference_log_probabilities_in_columns(tmp_path: Path) -> None:
    """One for each answer; of pairs and of rankings."""
    rows = groups()
    prepared = prepare(Dataset.from_list(rows), TOKENIZER)[0]
    values = [[-20.0 - 3 * i - j for j in range(len(row["completion_ids"]))] for i, row in enumerate(prepared)]
    prepared = prepared.add_column("ref_completion_logps", values)
    as_pairs = []
    for row, said in zip(prepared, values, strict=True):
        for chosen, rejected in row["pairs"]:
            sides = {"chosen_ids": row["completion_ids"][chosen], "rejected_ids": row["completion_ids"][rejected]}
            references = {"ref_chosen_logps": said[chosen], "ref_rejected_logps": said[rejected]}
            as_pairs.append({"prompt_ids": row["prompt_ids"]} | sides | references)
    how = {"has_reference": False}
    ours = train(tmp_path, rows, dataset=prepared, eval_dataset=prepared, **how)
    theirs = Dataset.from_list(as_pairs)
    own = {"per_device_train_batch_size": len(as_pairs)}
    assert_same(ours, train(tmp_path, rows, dataset=theirs, eval_dataset=theirs, packing="padded", **own, **how))
    ranked = [row | {"scores": row["scores"][:2], "completions": row["completions"][:2]} for row in rows]
    of_two = prepare(Dataset.from_list(ranked), TOKENIZER)[0]
    of_two = of_two.add_column("ref_completion_logps", [row[:2] for row in values])
    found = [
        train(tmp_path, ranked, dataset=of_two, eval_dataset=of_two, loss_type=name, **how)
        for name in ("plackett_luce", "sigmoid")
    ]
    assert_same(*found)


# ------------------------------------------------------------------------------------------- several processes, resume


def _on_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    for name, options in RUNS.items():
        own = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 1}
        found = train(Path(folder) / name, groups(), **own, **options)
        torch.save({key: found[key] for key in ("gradients", "log", "metrics")}, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


RUNS: dict[str, dict[str, Any]] = {
    "weighted": {"weight_by_score": True},
    "ranked": {"loss_type": "plackett_luce"},
}


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Each has another group, with another number of pairs and another sum of weights, at a time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_on_rank, (port, str(tmp_path)), nprocs=2)
    for name, options in RUNS.items():
        expected = train(tmp_path / "one", groups(), **options)
        for rank in range(2):
            got = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False)
            got["gradients"] = {key.removeprefix("module."): value for key, value in got["gradients"].items()}
            assert_same(got, expected)
            for metric in RANKED:
                assert got["log"][metric] == pytest.approx(expected["log"][metric], rel=1e-12)
                assert got["metrics"][f"eval_{metric}"] == pytest.approx(expected["metrics"][f"eval_{metric}"])


@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "plackett_luce"}, {"packing": "padded", "ld_alpha": 0.5}], ids=str
)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    prepared = prepare(Dataset.from_list(groups() * 2), TOKENIZER)[0]

    def make() -> Any:
        return make_model("llama", len(TOKENIZER))

    expected = run(tmp_path, make, prepared, **options)
    got = run(tmp_path, make, prepared, str(tmp_path / "checkpoint-2"), **options)
    assert differences(got, expected) == []
    other = prepared.select([*range(1, len(prepared)), 0])
    with pytest.raises(InputError, match="the rows are other ones, or in another order"):
        run(tmp_path, make, other, str(tmp_path / "checkpoint-2"), **options)
