"""What FSDP's first version is refused, before anything is trained; that it trains is in test_engines.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from broken_runs import id_rows
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from torch.distributed.fsdp import StateDictType
from trainer_runs import make_trainer

from fastdpo.trainer.fsdp1 import refuse_loading

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

FULL, SHARDED = StateDictType.FULL_STATE_DICT, StateDictType.SHARDED_STATE_DICT


def accelerator_of(kind: StateDictType | None, *, is_fsdp2: bool = False) -> Any:
    state = SimpleNamespace() if kind is None else SimpleNamespace(fsdp_plugin=SimpleNamespace(state_dict_type=kind))
    return SimpleNamespace(state=state, is_fsdp2=is_fsdp2, unwrap_model=lambda model: model)


def test_checkpoints_of_which_not_all_comes_back_are_not_loaded() -> None:
    model = make_model("llama")
    adapter = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], r=4))
    refuse_loading(accelerator_of(None), adapter)
    refuse_loading(accelerator_of(SHARDED, is_fsdp2=True), adapter)
    refuse_loading(accelerator_of(FULL), model)
    with pytest.raises(NotImplementedError, match=r"with an adapter are not loaded.*load_best_model_at_end.*FSDP2"):
        refuse_loading(accelerator_of(FULL), adapter)
    with pytest.raises(NotImplementedError, match=r"SHARDED_STATE_DICT are not loaded.*: FULL_STATE_DICT"):
        refuse_loading(accelerator_of(SHARDED), model)


def test_a_best_model_that_could_not_be_loaded_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(accelerator: Any, model: Any) -> None:
        raise NotImplementedError("refused")

    monkeypatch.setattr("fastdpo.trainer.fsdp1.refuse_loading", refuse)
    rows = id_rows(4, 384)
    options = {"train_dataset": rows, "eval_dataset": rows, "eval_strategy": "steps", "save_strategy": "steps"}
    make_trainer(tmp_path, None, **options)
    with pytest.raises(NotImplementedError, match="refused"):
        make_trainer(tmp_path, None, **options, load_best_model_at_end=True)
