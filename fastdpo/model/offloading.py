"""Activations that wait for the backward in the host's memory, and not in the accelerator's."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from fastdpo.model.language_model import language_model

# Smaller ones are not worth a copy.
_LEAST_BYTES = 1024


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; in pinned memory, if it comes from elsewhere, so that nobody waits for it."""
    pinned = tensor.device.type != "cpu"
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=pinned)


class ActivationOffloading:
    """Moves what autograd keeps of a model's forward to the host, and back where the backward asks for it.

    Weights stay, of which there is one copy in any case; so does what is small, and what the output embedding keeps,
    which the backward wants first of all. What several operations keep of one tensor, or of parts of it, is moved once
    each way, and has its strides again. Copies run on the stream that computes, in order: memory on the device may be
    used again at once, and nothing waits.

    With gradient checkpointing, what is moved are the inputs of the layers.

    Args:
        model: what is trained.
        device: where it is; what lies elsewhere is left there.
        copy: of a tensor, to the host.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, device: torch.device, copy: Callable[[Tensor], Tensor] = to_host
    ) -> None:
        self._model, self._device, self._copy = model, device, copy
        # Of each storage on the device, while it lives: what was moved of it, while somebody wants it back.
        self._moved: dict[int, dict[tuple[Any, ...], weakref.ref[_OnHost]]] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The forwards of the block are offloaded; their backward belongs into it as well."""
        own = (*self._model.parameters(), *self._model.buffers())
        stay = {id(storage): storage for storage in map(Tensor.untyped_storage, own)}

        def pack(tensor: Tensor) -> Tensor | _Packed:
            is_moved = tensor.device.type == self._device.type and tensor.layout == torch.strided
            if not is_moved or tensor.untyped_storage().nbytes() < _LEAST_BYTES:
                return tensor
            return tensor if id(tensor.untyped_storage()) in stay else self._packed(tensor)

        with saved_tensors_hooks(pack, _unpack), _left_alone(self._model):
            yield

    @torch.no_grad()
    def _packed(self, tensor: Tensor) -> _Packed:
        """What the tensor stands on as a whole, unless it is but a small part of that."""
        storage, size = tensor.untyped_storage(), tensor.element_size()
        if 2 * tensor.numel() * size < storage.nbytes() and 0 not in tensor.stride():
            return _Packed(self._on_host(tensor), None)
        whole = tensor.as_strided((storage.nbytes() // size,), (1,), 0)
        return _Packed(self._on_host(whole), (tensor.shape, tensor.stride(), int(tensor.storage_offset())))

    def _on_host(self, tensor: Tensor) -> _OnHost:
        storage = tensor.untyped_storage()
        if id(storage) not in self._moved:
            weakref.finalize(storage, self._moved.pop, id(storage), None).atexit = False
        moved = self._moved.setdefault(id(storage), {})
        # The last is another number each time that something was written into it.
        name = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        known = moved[name]() if name in moved else None
        if known is None:
            known = _OnHost(self._copy(tensor), tensor.device)
            moved[name] = weakref.ref(known)
        return known


class _OnHost:
    """A tensor that was moved, and its copy on the device while somebody holds that."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._tensor, self._device = tensor, device
        self._back: weakref.ref[Tensor] | None = None

    def back(self) -> Tensor:
        known = None if self._back is None else self._back()
        if known is None:
            known = self._tensor.to(self._device, non_blocking=True, copy=True)
            self._back = weakref.ref(known)  # which lives as long as a view of it does
        return known


class _Packed(NamedTuple):
    """What autograd holds of a tensor: where it is, and (shape, strides, offset) in that, or None for all of it."""

    of: _OnHost
    place: tuple[torch.Size, tuple[int, ...], int] | None


def _unpack(packed: Tensor | _Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    tensor = packed.of.back()
    return tensor if packed.place is None else tensor.as_strided(*packed.place)


@contextlib.contextmanager
def _left_alone(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """What the output embedding keeps stays where it is, until the block ends."""
    head = language_model(model).get_output_embeddings()
    open_hooks: list[saved_tensors_hooks] = []

    def enter(*_: Any) -> None:
        hooks = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        hooks.__enter__()
        open_hooks.append(hooks)

    def leave(*_: Any) -> None:
        if open_hooks:
            open_hooks.pop().__exit__()

    handles = []
    if head is not None:
        handles = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_offloading(device: torch.device, *, is_sharded: bool, compiles: bool) -> None:
    """Raises where a run cannot have its activations offloaded.

    Args:
        device: of the run.
        is_sharded: the model is divided over processes, by FSDP or DeepSpeed.
        compiles: by torch.compile.

    Raises:
        ValueError: there is nothing that it could do.
        NotImplementedError: it is not supported with these settings.
    """
    if device.type == "cpu":
        raise ValueError(
            "activation_offloading is on, which moves activations from an accelerator to the host's memory, and this "
            "run computes in the host's memory: leave it out (gradient_checkpointing saves memory here)"
        )
    if is_sharded or compiles:
        what = "FSDP or DeepSpeed" if is_sharded else "torch_compile"
        raise NotImplementedError(
            f"activation_offloading is not supported with {what}; leave one of them out (gradient_checkpointing saves "
            "memory there)"
        )
