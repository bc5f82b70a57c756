"""Short names for a model's weights and for files, by which a resume tells that it has what was saved.

xxh3 in 128 bits, at the speed of memory: it tells what was altered by chance, and not by somebody who means to deceive.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from fastdpo.trainer.fsdp1 import each_unit
from fastdpo.trainer.zero import gathered, local_part

_CHUNK = 1 << 26  # bytes at a time, on their way from a device and from a disk
HEADER = "(header)"  # of a safetensors file, beside its tensors


class WeightDigests:
    """The digests of a model's weights, again and again: what is frozen is read once."""

    def __init__(self) -> None:
        self._frozen: dict[str, tuple[tuple[int, int], str]] = {}

    def of(self, model: nn.Module) -> dict[str, str]:
        """name -> digest of each parameter and persistent buffer.

        Tied weights come once, by the first of their names. Where FSDP or ZeRO-3 shards the model, all processes have
        to call this together: a tensor, or with FSDP's first version a layer, at a time is gathered.
        """
        if isinstance(model, FullyShardedDataParallel):
            return _digests_of_units(model)
        return {name: self._of_tensor(name, tensor) for name, tensor in saved_tensors(model)}

    def _of_tensor(self, name: str, tensor: Tensor) -> str:
        if not isinstance(tensor, nn.Parameter) or tensor.requires_grad or isinstance(tensor, DTensor):
            return _digest_of_whole(tensor)
        part = local_part(tensor)
        state = (part.data_ptr(), part._version)
        known = self._frozen.get(name)
        if known is None or known[0] != state:
            known = self._frozen[name] = (state, _digest_of_whole(tensor))
        return known[1]


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of what a checkpoint of ``model`` has to bring back: parameters and persistent buffers."""
    yield from model.named_parameters()
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}" if prefix else name, buffer


def tensor_digest(tensor: Tensor) -> str:
    """Of values, type and shape; 32 hexadecimal digits."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for chunk in tensor.reshape(-1).view(torch.uint8).split(_CHUNK):
        digest.update(chunk.cpu().numpy())
    return digest.hexdigest()


def file_digests(path: Path) -> dict[str, str]:
    """part -> digest of a file's bytes: of a safetensors file its tensors by name, and its header; else one part, "".

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = _parts_of(path, size)
        found = {}
        for name, begin, end in parts:
            file.seek(begin)
            digest, left = xxhash.xxh3_128(), end - begin
            while left > 0 and (piece := file.read(min(left, _CHUNK))):
                digest.update(piece)
                left -= len(piece)
            found[name] = digest.hexdigest()
    return found


def flush_to_disk(path: Path) -> None:
    """Wait until the bytes of a file that somebody else wrote, or a folder's names, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parts_of(path: Path, size: int) -> list[tuple[str, int, int]]:
    """(name, begin, end) of the parts of a file that have a digest of their own."""
    whole = [("", 0, size)]
    if path.suffix != ".safetensors":
        return whole
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        if begin > size:
            return whole
        try:
            entries = json.loads(file.read(begin - 8))
            offsets = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
            tensors = [(name, begin + start, begin + end) for name, (start, end) in sorted(offsets.items())]
        except (ValueError, TypeError, KeyError, AttributeError):
            return whole
    return [(HEADER, 0, begin), *tensors]


def _digest_of_whole(tensor: Tensor) -> str:
    with gathered([tensor]):
        return tensor_digest(tensor)


def _digests_of_units(model: FullyShardedDataParallel) -> dict[str, str]:
    found: dict[str, str] = {}

    def note(tensors: dict[str, Tensor]) -> None:
        # Of a copy: FSDP could not free memory that numpy has looked at.
        found.update({name: tensor_digest(tensor.clone()) for name, tensor in tensors.items()})

    each_unit(model, note, writes=False)
    return found
