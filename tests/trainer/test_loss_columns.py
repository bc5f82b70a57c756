"""Losses that need more of a batch than its pairs: margins of rows, and beta-DPO's mean over the whole batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from broken_runs import differences, id_rows, losses
from datasets import Dataset
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows, write_jsonl
from trainer_runs import config, make_trainer

from fastdpo.data import prepare
from fastdpo.data.files import load_preferences
from fastdpo.data.terms import DataError
from fastdpo.errors import InputError
from fastdpo.trainer import DPOTrainer
from fastdpo.trainer.batch_beta import BETA_FILE

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

ROWS = id_rows(8, 90)


def with_margins(rows: Any, margins: list[float]) -> Dataset:
    return rows.add_column("margin", margins)


def run(folder: Path, rows: Dataset, resume: Any = None, **options: Any) -> DPOTrainer:
    defaults = {"max_steps": 4, "gradient_checkpointing": False, "learning_rate": 1e-2, "beta": 0.3}
    trainer = DPOTrainer(make_model("llama", 96), args=config(folder, **(defaults | options)), train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("layout", ["shared", "repeated", "padded"])
def test_margins_of_rows_reach_their_pairs(tmp_path: Path, layout: str) -> None:
    margins = [0.5, -1.0, 2.0, 0.0, 1.5, 3.0, -0.5, 1.0]
    options: dict[str, Any] = {"packing": layout, "per_device_train_batch_size": 8, "max_steps": 1}
    trainer = run(tmp_path, with_margins(ROWS, margins), margin_alpha=0.7, **options)
    # Where policy and reference agree, m is 0, and the loss is that of the margins alone.
    expected = -F.logsigmoid(-0.7 * torch.tensor(margins)).mean().item()
    assert losses(trainer) == pytest.approx([expected], rel=1e-6)
    assert losses(run(tmp_path, with_margins(ROWS, margins), **options)) == pytest.approx(
        [-F.logsigmoid(torch.zeros(1)).item()]
    )


def test_in_parts_and_with_weights(tmp_path: Path) -> None:
    margins, weights = [0.5, -1.0, 2.0, 0.0, 1.5, 3.0, -0.5, 1.0], [1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 3.0, 1.0]
    rows = with_margins(ROWS, margins).add_column("weight", weights)
    whole = run(tmp_path, rows, margin_alpha=1.0, per_device_train_batch_size=8, max_steps=2)
    parts = run(tmp_path, rows, margin_alpha=1.0, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                max_tokens_per_batch=40, max_steps=2)  # fmt: skip
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    counts = torch.tensor(weights)
    expected = (counts * -F.logsigmoid(-torch.tensor(margins))).sum() / counts.sum()
    assert losses(whole)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_the_column_is_prepared_where_it_is_asked_for(tmp_path: Path) -> None:
    rows = with_margins(Dataset.from_list(text_rows(4)), [1.0, 2.0, 0.0, -1.0])
    tokenizer = make_tokenizer()
    plain, summary = prepare(rows, tokenizer)
    assert "margin" not in plain.column_names and summary.unused_columns == ["margin"]
    kept, summary = prepare(rows, tokenizer, margins=True)
    assert kept["margin"][:] == [1.0, 2.0, 0.0, -1.0] and not summary.unused_columns
    trainer = make_trainer(tmp_path, tokenizer, train_dataset=rows, margin_alpha=1.0)
    assert trainer.train_dataset["margin"][:] == [1.0, 2.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (ROWS, {}, "the rows have no column 'margin'"),
        (with_margins(ROWS, [1.0] * 7 + [float("nan")]), {}, "row 7, margin: it is nan"),
        (ROWS.add_column("margin", ["large"] * 8), {}, "column 'margin' has type"),
        (Dataset.from_list(text_rows(4)), {"group_by_prompt": True}, "groups of answers, whose pairs have none"),
    ],
)
def test_margins_that_are_none(tmp_path: Path, rows: Dataset, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make_trainer(tmp_path, make_tokenizer(), train_dataset=rows, margin_alpha=1.0, **options)


@pytest.mark.parametrize("column", ["margin", "weight", "ref_chosen_logps"])
@pytest.mark.parametrize(("odd", "said"), [("2", '"2"'), ([1.0], "[1.0]"), (True, "true"), (None, "null")])
def test_files_that_mix_numbers_with_something_else(tmp_path: Path, column: str, odd: Any, said: str) -> None:
    values = [1.0, odd, 3, {} if odd is None else 4]
    rows = [{**row, "ref_rejected_logps": -1.0, column: value} for row, value in zip(text_rows(4), values, strict=True)]
    args = {"margins": True} if column == "margin" else {}
    drop = {} if column == "ref_chosen_logps" else {"ref_rejected_logps"}
    path = write_jsonl(tmp_path / "pairs.jsonl", [{k: v for k, v in row.items() if k not in drop} for row in rows])
    with pytest.raises(DataError, match=rf"row 1, {column}: it is {re.escape(said)}; it should "):
        prepare(load_preferences(str(path)), make_tokenizer(), **args)


@pytest.mark.parametrize("column", ["margin", "weight"])
def test_a_run_whose_rows_say_otherwise_is_not_gone_on_with(tmp_path: Path, column: str) -> None:
    said = [0.5, 1.0, 2.0, 1.0, 1.5, 3.0, 0.5, 1.0]
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    alpha = {"margin_alpha": 0.7} if column == "margin" else {}
    rows = ROWS.add_column(column, said)
    unbroken = run(tmp_path, rows, **alpha, **options)
    checkpoint = str(tmp_path / "checkpoint-2")
    assert differences(run(tmp_path, rows, checkpoint, **alpha, **options), unbroken) == []
    other = ROWS.add_column(column, [*said[:7], 1.25])
    with pytest.raises(InputError, match=f"the rows' {column}s are other ones"):
        run(tmp_path, other, checkpoint, **alpha, **options)
    assert len(losses(run(tmp_path, other, checkpoint, ignore_data_skip=True, **alpha, **options))) == 4
    if column == "margin":  # which are left out as freely as they are multiplied by something else
        assert len(losses(run(tmp_path, rows, checkpoint, **options))) == 4
    else:
        with pytest.raises(InputError, match="the rows' weights are other ones"):
            run(tmp_path, ROWS, checkpoint, **options)


def test_losses_without_a_margin_refuse_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="margin_alpha is given.*loss_type 'ipo' is no function of a margin"):
        config(tmp_path, margin_alpha=1.0, loss_type="ipo")


# --------------------------------------------------------------------------------------------------------------------
# beta-DPO
# --------------------------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_moving_average_of_whole_batches(tmp_path: Path) -> None:
    """Each step's loss and beta from the log of an equal run's margins: with all rows in each batch, they are known."""
    options: dict[str, Any] = {"loss_type": "beta_dpo", "per_device_train_batch_size": 8, "beta_dpo_alpha": 0.5}
    options |= {"learning_rate": 3e-4, "lr_scheduler_type": "constant"}
    trainer = run(tmp_path, ROWS, **options)
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "loss" in entry]
    threshold = 0.0
    for margin in margins:
        threshold = 0.9 * threshold + 0.1 * margin
    assert trainer._batch_beta is not None
    assert trainer._batch_beta.threshold == pytest.approx(threshold, rel=1e-6)
    # The last step: the pairs' own margins under the weights before it.
    before = run(tmp_path / "before", ROWS, **(options | {"max_steps": 3}))
    batch = before._prepare_inputs(before.data_collator(list(ROWS)))
    with torch.no_grad():
        _, per_pair = before.pair_losses(before.model, batch)
    mean = per_pair["margin"].mean()
    beta = 0.3 * (1 + 0.5 * (mean - before._batch_beta.threshold))
    expected = -F.logsigmoid(beta / 0.3 * per_pair["margin"]).mean().item()
    assert losses(trainer)[3] == pytest.approx(expected, rel=1e-5)
    # Without a gradient it is DPO's loss, whatever else is in the batch.
    plain = -F.logsigmoid(per_pair["margin"])
    torch.testing.assert_close(per_pair["loss"], plain)
    assert losses(trainer)[3] != pytest.approx(plain.mean().item(), rel=1e-4)


def test_without_alpha_it_is_dpo(tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_device_train_batch_size": 4}
    dynamic = run(tmp_path, ROWS, loss_type="beta_dpo", beta_dpo_alpha=0.0, **options)
    assert losses(dynamic) == pytest.approx(losses(run(tmp_path, ROWS, **options)), rel=1e-6)


def test_a_resumed_run_has_the_threshold(tmp_path: Path) -> None:
    options: dict[str, Any] = {"loss_type": "beta_dpo", "save_strategy": "steps", "save_steps": 2}
    unbroken = run(tmp_path, ROWS, **options)
    checkpoint = tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / BETA_FILE).read_text())["threshold"] != 0
    resumed = run(tmp_path, ROWS, str(checkpoint), **options)
    assert differences(resumed, unbroken) == []
    assert resumed._batch_beta.threshold == unbroken._batch_beta.threshold
    other = run(tmp_path / "other", ROWS, save_strategy="steps", save_steps=2)
    assert other.state.global_step == 4
    with pytest.raises(InputError, match=f"has no {BETA_FILE} that can be read"):
        run(tmp_path / "other", ROWS, str(tmp_path / "other" / "checkpoint-2"), **options)


def test_the_batch_is_taken_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 2, but with loss_type beta_dpo"):
        config(tmp_path, loss_type="beta_dpo", gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="a pair's loss depends on the whole batch"):
        config(tmp_path, loss_type="beta_dpo", max_tokens_per_batch=100)
