"""What FSDP in its first version needs to take back all that a checkpoint holds; accelerate leaves some of it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

from fastdpo.errors import InputError
from fastdpo.trainer.fsdp1 import each_unit, plain_names
from fastdpo.trainer.manifest import name_some


def load_adapter(model: Any, folder: Path) -> None:
    """Puts the adapter that PEFT saved to ``folder`` into a sharded model that has one. To be called by all processes.

    accelerate's ``load_fsdp_model`` puts in nothing, and does not say so: PEFT looks for the names of parameters in
    ``state_dict()``, which holds none but in the main process, and in ``named_parameters()``, where they begin with
    FSDP's own name.

    Raises:
        InputError: a weight is not there, or has another shape; the message names it.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    keys = _keys_of_adapter(model)
    left = set(keys)

    def put(tensors: dict[str, Tensor]) -> None:
        for name in tensors.keys() & keys.keys():
            value = saved.get(keys[name])
            if value is not None and value.shape == tensors[name].shape:
                tensors[name].copy_(value)
                left.discard(name)

    each_unit(model, put, writes=True)
    if left:
        raise InputError(f"{path} does not fit the adapter: {name_some(sorted(left))}")


def _keys_of_adapter(model: FullyShardedDataParallel) -> dict[str, str]:
    """Name -> what PEFT calls it in its file, of all parameters of a model that are saved with its adapter."""
    marks: dict[str, Tensor] = {}

    def mark(tensors: dict[str, Tensor]) -> None:
        marks.update({name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()})

    each_unit(model, mark, writes=False)
    adapted: Any = model.module
    with plain_names(model):
        found = get_peft_model_state_dict(adapted, state_dict=marks, adapter_name=adapted.active_adapter)
    names = {id(tensor): name for name, tensor in marks.items()}
    return {names[id(tensor)]: key for key, tensor in found.items()}


def refuse_loading(plugin: Any) -> None:
    """Raises where what a checkpoint holds would not all come back: a run would go on from elsewhere, and not say so.

    Args:
        plugin: accelerate's settings of FSDP; None without it.

    Raises:
        NotImplementedError: FSDP is in its first version, and saves what torch has no way back from.
    """
    if plugin is None or plugin.fsdp_version != 1 or plugin.state_dict_type != StateDictType.LOCAL_STATE_DICT:
        return
    # torch's FullyShardedDataParallel.optim_state_dict_to_load takes whole states and sharded ones.
    raise NotImplementedError(
        "checkpoints of FSDP's first version with state_dict_type LOCAL_STATE_DICT are not loaded "
        "(resume_from_checkpoint, load_best_model_at_end): the optimizer's state would not come back. Use "
        "fsdp_state_dict_type: FULL_STATE_DICT or SHARDED_STATE_DICT"
    )


def make_state(model: Any, optimizer: Any) -> None:
    """Has an optimiser that made no step yet hold the state that it will have, for a checkpoint to be read into.

    accelerate's ``load_fsdp_optimizer`` reads shards into what the optimiser holds: of a new one that is nothing, so
    that nothing is read, and the moments begin at 0 again. To be called by all processes.
    """
    get_optimizer_state_dict(model, optimizer)  # which makes it first
