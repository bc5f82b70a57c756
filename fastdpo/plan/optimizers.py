"""What an optimiser of ``--optim`` keeps for each parameter, and what its step needs for a moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Size, dtype

Parameter = tuple[Size, dtype]

# bitsandbytes: parameters of fewer numbers keep 32 bits; the others a scale for each block.
_LEAST_8BIT, _BLOCK_8BIT = 4096, 256
# torchao: the same, in blocks of 256 (8 bits) and 128 (4 bits).
_BLOCK_4BIT = 128


def _as_weights(copies: int) -> Callable[[Size, dtype], int]:
    return lambda shape, kind: copies * shape.numel() * kind.itemsize


def _in_32bit(copies: int) -> Callable[[Size, dtype], int]:
    return lambda shape, kind: 4 * copies * shape.numel()


def _in_blocks(copies: int, bits: int, block: int) -> Callable[[Size, dtype], int]:
    def count(shape: Size, kind: dtype) -> int:
        numbers = shape.numel()
        if numbers < _LEAST_8BIT:
            return 4 * copies * numbers
        return copies * (numbers * bits // 8 + -(-numbers // block) * 4)

    return count


def _adafactor(shape: Size, kind: dtype) -> int:
    """Means over rows and over columns, where there are both (Shazeer and Stern 2018, arXiv 1804.04235)."""
    if len(shape) < 2:
        return 4 * shape.numel()
    return 4 * (shape[:-1].numel() + shape[:-2].numel() * shape[-1])


_OF_8BIT = {name: _in_blocks(copies, 8, _BLOCK_8BIT) for name, copies in (("adamw", 2), ("lion", 1), ("ademamix", 3))}

# --optim -> bytes that are kept for a parameter.
_STATES: dict[str, Callable[[Size, dtype], int]] = {
    "adamw_torch": _as_weights(2),
    "adamw_torch_fused": _as_weights(2),
    "adamw_8bit": _OF_8BIT["adamw"],
    "adamw_bnb_8bit": _OF_8BIT["adamw"],
    "adamw_torch_8bit": _in_blocks(2, 8, _BLOCK_8BIT),
    "adamw_torch_4bit": _in_blocks(2, 4, _BLOCK_4BIT),
    "paged_adamw_8bit": _OF_8BIT["adamw"],
    "paged_adamw_32bit": _in_32bit(2),
    "ademamix": _in_32bit(3),
    "ademamix_8bit": _OF_8BIT["ademamix"],
    "paged_ademamix_32bit": _in_32bit(3),
    "paged_ademamix_8bit": _OF_8BIT["ademamix"],
    "lion_32bit": _in_32bit(1),
    "lion_8bit": _OF_8BIT["lion"],
    "paged_lion_32bit": _in_32bit(1),
    "paged_lion_8bit": _OF_8BIT["lion"],
    "rmsprop": _as_weights(1),
    "rmsprop_bnb": _in_32bit(1),
    "rmsprop_bnb_8bit": _OF_8BIT["lion"],
    "rmsprop_bnb_32bit": _in_32bit(1),
    "adagrad": _as_weights(1),
    "adafactor": _adafactor,
    "sgd": _as_weights(0),
}
KNOWN = tuple(_STATES)

# Steps that make copies as large as a parameter: how many at a time.
_COPIES = {"adamw_torch": 2, "adafactor": 3, "rmsprop": 2, "adagrad": 2}


def check_optimizer(name: str) -> None:
    """Raises ValueError for one whose state is not known here."""
    if name not in _STATES:
        raise ValueError(f"optim is {name!r}, whose memory is not known here; known are {', '.join(KNOWN)}")


def state_bytes(name: str, parameters: Sequence[Parameter]) -> int:
    """What the optimiser keeps from step to step.

    Args:
        name: of ``--optim``.
        parameters: shape and dtype of each that is trained.

    Raises:
        ValueError: it is not known here.
    """
    check_optimizer(name)
    return sum(_STATES[name](shape, kind) for shape, kind in parameters)


def step_bytes(name: str, parameters: Sequence[Parameter], *, all_at_once: bool) -> int:
    """What its step needs for a moment beside that; ``all_at_once``, as on an accelerator, for all parameters together.

    Raises:
        ValueError: it is not known here.
    """
    check_optimizer(name)
    sizes = [shape.numel() * kind.itemsize for shape, kind in parameters]
    if name == "adamw_torch" and all_at_once:
        return sum(sizes)
    return _COPIES.get(name, 0) * max(sizes, default=0)
