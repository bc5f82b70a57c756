"""What is logged of a batch, from the rewards of its pairs."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_models import make_model
from toy_data import SENTENCES, make_tokenizer
from trainer_runs import make_trainer

from fastdpo.trainer.pair_metrics import means_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rankings_with_answers_that_are_in_no_pair(tmp_path: Path) -> None:
    """The loss of rankings is of them as well, and so is what is logged of rankings: as where all pairs are named."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"prompt_ids": [7, 8, 9 + i], "completion_ids": torch.randint(20, 60, (4, 3 + i), generator=generator).tolist()}
        for i in range(6)
    ]
    kept = {"one": [[2, 0]], "all": [list(pair) for pair in combinations([2, 0, 3, 1], 2)]}
    kinds = {
        name: [row | {"pairs": pairs, "ranks": [1.0, 3.0, 0.0, 2.0]} for row in rows] for name, pairs in kept.items()
    }
    trainer = make_trainer(
        tmp_path,
        make_tokenizer(),
        model=make_model("llama", seed=1),
        ref_model=make_model("llama", seed=2),
        train_dataset=Dataset.from_list(kinds["one"]),
        loss_type="plackett_luce",
    )
    found = {}
    for name, said in kinds.items():
        batch = trainer._prepare_inputs(trainer.data_collator(said))
        with torch.no_grad():
            _, per_pair = trainer.pair_losses(trainer.model, batch)
        found[name] = means_of({key: float(values.sum()) for key, values in per_pair.items()})
    for metric in ("rewards/top1", "rewards/kendall_tau"):
        assert found["one"][metric] == pytest.approx(found["all"][metric], rel=1e-5)
    assert -1 < found["all"]["rewards/kendall_tau"] < 1


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("ld_alpha", [None, 0.2, 0.0])
def test_rankings_agree_by_the_rewards_of_their_pairs(ld_alpha: float | None, order: int, tmp_path: Path) -> None:
    """With LD-DPO an answer has another reward in each of its pairs, in whatever order these are."""
    rows = []
    for number in range(6):
        answers = [" " + " ".join(SENTENCES[(number + i) % 6 :][: 1 + i % 3]) + f" {i}" for i in range(4)]
        pairs = [[a, b] for a, b in combinations([2, 0, 3, 1], 2)][::order]
        rows.append({"prompt": f"Say {number}:", "completions": answers, "pairs": pairs, "ranks": [1, 3, 0, 2]})
    trainer = make_trainer(
        tmp_path,
        make_tokenizer(),
        model=make_model("llama", seed=1),
        ref_model=make_model("llama", seed=2),
        train_dataset=Dataset.from_list(rows),
        max_tokens_per_batch=300,
        ld_alpha=ld_alpha,
    )
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    with torch.no_grad():
        _, per_pair = trainer.pair_losses(trainer.model, batch)
    margins = (per_pair["chosen_reward"] - per_pair["rejected_reward"]).view(6, 6)
    margins = margins if order == 1 else margins.flip(1)
    metrics = means_of({name: float(values.sum()) for name, values in per_pair.items()})
    assert metrics["rewards/kendall_tau"] == pytest.approx(float(margins.sign().mean()))
    assert metrics["rewards/top1"] == pytest.approx(float((margins[:, :3] > 0).all(1).double().mean()))
    assert 0.1 < float((margins > 0).double().mean()) < 0.9
