"""FSDP's first version: what is read and written of a sharded model; whole runs are in test_engines.py."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broken_runs import id_rows
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from trainer_runs import make_trainer

from fastdpo.errors import InputError
from fastdpo.trainer.digests import WeightDigests
from fastdpo.trainer.fsdp1 import each_unit
from fastdpo.trainer.fsdp1_loading import load_adapter, make_state, refuse_loading

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

LORA = LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], r=4)


def adapted() -> Any:
    model = get_peft_model(make_model("llama"), LORA)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


def both_on_rank(folder: Path) -> list[dict[str, Any]]:
    return [sharded_on_rank(folder / str(use), use) for use in (False, True)]


def sharded_on_rank(folder: Path, use_orig_params: bool) -> dict[str, Any]:
    """What is found of a model before it is sharded, after, once its adapter is other, and when that is loaded."""
    digests = WeightDigests()
    whole = adapted()
    found: dict[str, Any] = {"whole": digests.of(whole)}
    whole.save_pretrained(folder / str(torch.distributed.get_rank()))
    model = FullyShardedDataParallel(
        whole,
        auto_wrap_policy=fsdp_auto_wrap_policy(whole),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
    )
    found["sharded"] = digests.of(model)

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora" in name or "modules_to_save" in name:
                tensor.zero_()

    each_unit(model, change, writes=False)
    found["looked at"] = digests.of(model)
    each_unit(model, change, writes=True)
    found["changed"] = digests.of(model)
    load_adapter(model, folder / "0")
    found["loaded"] = digests.of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad and p.numel()])
    make_state(model, optimizer)
    found["state"] = len(optimizer.state) == len(optimizer.param_groups[0]["params"])
    found["after"] = digests.of(model)
    torch.distributed.barrier()
    file = folder / "0" / "adapter_model.safetensors"
    if torch.distributed.get_rank() == 0:
        saved = load_file(file)
        saved.pop(next(name for name in saved if "lora_A" in name))
        save_file(saved, file)
    torch.distributed.barrier()
    with pytest.raises(InputError) as raised:
        load_adapter(model, folder / "0")
    found["said"] = str(raised.value)
    return found


def test_a_sharded_adapter_is_read_and_written_whole(tmp_path: Path) -> None:
    ranks = on_ranks(functools.partial(both_on_rank, tmp_path), 2, tmp_path)
    for found in (*ranks[0], *ranks[1]):
        whole = found["whole"]
        for name in ("sharded", "looked at", "loaded", "after"):
            assert found[name] == whole, name
        assert found["changed"].keys() == whole.keys()
        others = {name for name in whole if found["changed"][name] != whole[name]}
        assert others == {name for name in whole if "lora" in name or "modules_to_save" in name}
        assert found["state"]
        assert "does not fit the adapter: base_model.model" in found["said"] and "lora_A" in found["said"]


def plugin_of(kind: StateDictType, version: int = 1) -> Any:
    return SimpleNamespace(state_dict_type=kind, fsdp_version=version)


def test_checkpoints_of_which_not_all_comes_back_are_not_loaded() -> None:
    for plugin in (None, *map(plugin_of, (StateDictType.FULL_STATE_DICT, StateDictType.SHARDED_STATE_DICT))):
        refuse_loading(plugin)
    refuse_loading(plugin_of(StateDictType.LOCAL_STATE_DICT, version=2))
    with pytest.raises(NotImplementedError, match=r"LOCAL_STATE_DICT are not loaded.*FULL_STATE_DICT or SHARDED"):
        refuse_loading(plugin_of(StateDictType.LOCAL_STATE_DICT))


@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        ({}, False),
        ({"resume_from_checkpoint": "false"}, False),
        ({"resume_from_checkpoint": "auto"}, True),
        ({"load_best_model_at_end": True}, True),
    ],
)
def test_that_is_said_before_models_are_loaded(
    options: dict[str, Any], is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        pass

    def reach(*_: Any, **__: Any) -> None:
        raise Reached

    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "LOCAL_STATE_DICT")
    monkeypatch.setattr("fastdpo.trainer.setup.engine_of", lambda args: "FSDP")
    monkeypatch.setattr("fastdpo.trainer.setup.make_models", reach)
    rows = id_rows(4, 384)
    both = {"train_dataset": rows, "eval_dataset": rows, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(NotImplementedError if is_refused else Reached):
        make_trainer(tmp_path, None, **both, **options)
