"""Weights that come back from a checkpoint: all of them, or an error that names those that do not.

``transformers.Trainer`` reads a checkpoint's file into the live model as it is, and passes over what does not fit. But
``save_pretrained`` writes the names and shapes of the Hub, from which those of many live models differ: the experts of
most mixtures are one tensor each there, and one for all of them here. ``from_pretrained`` turns the one into the other.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from fastdpo.errors import InputError
from fastdpo.model.adapter_vocabulary import unsaved_rows
from fastdpo.model.adapters import has_transformers_adapter
from fastdpo.model.load_sharding import is_load_sharded
from fastdpo.trainer.digests import WeightDigests, saved_tensors, tensor_digest
from fastdpo.trainer.disk import why_not_written
from fastdpo.trainer.fsdp2 import reshard
from fastdpo.trainer.leftovers import trial_folder
from fastdpo.trainer.manifest import name_some

# Up to so many bytes of weights that are converted on their way are written and read, to see whether they come back.
_TRIED_BYTES = 1 << 30


class UnsavableError(NotImplementedError):
    """What is saved of the model would not bring it back; the message says what is missing, and why."""


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights that ``save_pretrained`` wrote to ``folder`` into ``model``, in place.

    They are read as ``from_pretrained`` reads them, into a second model on the CPU; where it spread the model over
    processes, all of which call this, each of them reads its parts, to where its own are.

    Raises:
        InputError: a tensor is missing, has another shape, or belongs to no parameter; the message names it.
    """
    cut = {"distributed_config": model.config.distributed_config} if is_load_sharded(model) else {}
    try:
        saved, info = _loaded(model, folder, config=copy.deepcopy(model.config), local_files_only=True, **cut)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        wrong = _other_names(model, folder) or _first_line(error)
        raise InputError(f"{folder}: the weights cannot be loaded: {wrong}") from error
    wrong = _wrong_in(info)
    if wrong:
        raise InputError(f"{folder}: the weights do not fit the model: {wrong}")
    reshard(model)
    state = saved.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            _part(tensor).copy_(_part(state[name]))


def check_weights(model: nn.Module, expected: dict[str, str], source: Path, digests: WeightDigests) -> None:
    """Raises unless the model's weights are those whose digests are ``expected``; ``source`` is where they are from.

    Raises:
        InputError: some are not; the message names them.
    """
    found = digests.of(model)
    if not found or not expected:
        return
    kinds = {
        "not in the checkpoint": found.keys() - expected.keys(),
        "not in the model": expected.keys() - found.keys(),
        "other values": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
    }
    wrong = "; ".join(f"{kind}: {name_some(names)}" for kind, names in kinds.items() if names)
    if wrong:
        raise InputError(
            f"{source}: the model's weights are not those that were saved there ({wrong}). If the base of an adapter "
            "or the version of a library changed since, give the former one"
        )


def check_comes_back(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Whether what will be saved of ``model`` brings it back, found out before anything is trained.

    Names and shapes are followed through ``save_pretrained`` and ``from_pretrained`` with tensors that hold nothing.
    Where weights are converted on the way, and are not large, they are written to ``folder`` for a moment, and read.
    Of an adapter, which would be loaded into the very model, it is enough that PEFT saves all that is trained.

    Raises:
        UnsavableError: it does not.
    """
    if isinstance(model, PeftModel):
        if unsaved := _unsaved_beside(model):
            raise UnsavableError(
                f"{name_some(unsaved)} would be trained, but PEFT does not save that with the adapter, so that no "
                "checkpoint could bring it back. Name the module in modules_to_save (--lora_modules_to_save), or turn "
                "requires_grad off"
            )
        if lost := unsaved_rows(model):
            raise UnsavableError(
                f"the model's embeddings were resized, and PEFT does not save the new rows of {name_some(lost)} with "
                "this adapter, so that nothing could bring them back. Save the resized model by itself "
                "(save_pretrained), and train on that; or name both embeddings in modules_to_save "
                "(--lora_modules_to_save)"
            )
        return
    if has_transformers_adapter(model):
        return
    with trial_folder(folder) as place:
        kind = type(model)
        try:
            model.config.save_pretrained(place)
            config = type(model.config).from_pretrained(place)
        except Exception as error:  # whatever a configuration's class makes of its own file
            raise UnsavableError(
                f"the configuration of a {kind.__name__} cannot be read again once it is written, so that nothing that "
                f"a run saves could be loaded: {_first_line(error)}"
            ) from error
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        try:
            wrong, is_converted = _lost_names(model, config, state)
            if not wrong and is_converted and sum(tensor.nbytes for tensor in state.values()) <= _TRIED_BYTES:
                wrong = _lost_values(model, place, state)
            wrong = wrong or _lost_to_initialisation(model)
        except Exception as error:  # the conversions of hundreds of families
            if why_not_written(error):  # which says nothing of the model
                raise
            wrong = _first_line(error)
    if wrong:
        raise UnsavableError(
            f"what save_pretrained writes of a {kind.__name__} does not bring it back ({wrong}): neither a checkpoint "
            "nor the trained model could be loaded. Another version of transformers may do better"
        )


def load_adapter_weights(model: Any, folder: Path) -> None:
    """The adapter that ``save_pretrained`` of a model with transformers' own adapter wrote, in place."""
    prefix = "base_model.model."
    state = load_file(folder / "adapter_model.safetensors")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    set_peft_model_state_dict(model, state, adapter_name=model.active_adapters()[0])


def _part(tensor: Tensor) -> Tensor:
    """What of it this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _unsaved_beside(model: PeftModel) -> list[str]:
    """Names of parameters that are trained, and are in nothing that is saved of the active adapter."""
    saved = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False).values()
    places = {tensor.data_ptr() for tensor in saved}
    others = {name: p for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in places}
    # Some kinds of adapters save a copy.
    copies = {tensor_digest(tensor) for tensor in saved} if others else set()
    return [name for name, parameter in others.items() if tensor_digest(parameter) not in copies]


def _other_names(model: PreTrainedModel, folder: Path) -> str:
    """What the files in ``folder`` have of other names than ``save_pretrained`` would give; empty for nothing."""
    empty = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    expected, found = set(revert_weight_conversion(model, empty)), set()
    for path in folder.glob("model*.safetensors"):
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
            found.update(file.keys())
    missing = expected - found - set(getattr(model, "all_tied_weights_keys", None) or ())
    kinds = {"missing": missing, "of no parameter": found - expected}
    return "; ".join(f"{kind}: {name_some(names)}" for kind, names in kinds.items() if names)


def _lost_names(model: PreTrainedModel, config: Any, state: dict[str, Tensor]) -> tuple[str, bool]:
    """What has no counterpart once it is saved and loaded; and whether anything but names is changed on the way."""
    empty = {name: tensor.to("meta") for name, tensor in state.items()}
    saved = revert_weight_conversion(model, empty)
    _, info = _loaded(model, None, config=config, state_dict=dict(saved), device_map={"": "meta"})
    return _wrong_in(info), saved is not empty


def _lost_values(model: PreTrainedModel, place: Path, state: dict[str, Tensor]) -> str:
    with _undisturbed():
        model.save_pretrained(place)
    loaded = _loaded(model, place)[0].state_dict()
    return name_some([name for name, tensor in state.items() if not _is_same(tensor.cpu(), loaded[name])])


def _lost_to_initialisation(model: PreTrainedModel) -> str:
    """The embeddings whose padding row ``from_pretrained`` sets to 0 after it was loaded, where it is not 0 anyway.

    Of an embedding that is the head as well, every row is trained.
    """
    head = model.get_output_embeddings()
    lost = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        small = nn.Embedding(module.padding_idx + 1, 2, module.padding_idx)
        nn.init.ones_(small.weight)
        small.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # so from_pretrained marks what it loaded
        with _undisturbed():
            model._init_weights(small)
        is_head = head is not None and getattr(head, "weight", None) is module.weight
        if not bool((small.weight == 1).all()) and (is_head or bool(module.weight[module.padding_idx].any())):
            lost.append(f"row {module.padding_idx} of {name}.weight")
    return f"{name_some(lost)} is set to 0 when it is loaded" if lost else ""


def _loaded(model: PreTrainedModel, folder: Path | None, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A second model, and what ``from_pretrained`` says of it; in the widest type of ``model``, so that none is cut."""
    kinds = [tensor.dtype for _, tensor in saved_tensors(model) if tensor.is_floating_point()]
    widest = functools.reduce(torch.promote_types, kinds, kinds[0])
    with _undisturbed():
        found: Any = type(model).from_pretrained(folder, dtype=widest, output_loading_info=True, **options)
    loaded, info = found
    return loaded, info


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Neither random numbers nor bars on the screen, which belong to the run."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _is_same(tensor: Tensor, loaded: Tensor) -> bool:
    return tensor.shape == loaded.shape and torch.equal(tensor, loaded.to(tensor.dtype))


def _wrong_in(info: dict[str, Any]) -> str:
    kinds = {"missing": "missing_keys", "of another shape": "mismatched_keys", "of no parameter": "unexpected_keys"}
    found = {
        words: [entry[0] if isinstance(entry, tuple) else entry for entry in info.get(key) or ()]
        for words, key in kinds.items()
    }
    words = [f"{kind}: {name_some(names)}" for kind, names in found.items() if names]
    return "; ".join(words + [str(message) for message in info.get("error_msgs") or ()])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' if lines else ''}{' '.join(line.strip() for line in lines[:2])}"
