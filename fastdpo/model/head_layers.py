"""The layers that are a model's output embedding: which they are, whether they can be scored, another forward in them.

Which is ours is decided by what their forward does, and not by what they are called: a layer that anybody has changed
is refused by name.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.model.head_adapters import why_not_supported
from fastdpo.model.head_parts import HeadLayer, is_of_a_plan

_HOW_NOT_TO_QUANTIZE = (
    ". Leave it out when the model is quantised: by default BitsAndBytesConfig does; where llm_int8_skip_modules is "
    "given, that must name it"
)


def find_heads(lm: PreTrainedModel, name: str) -> list[HeadLayer]:
    """The layers that may be called as output embedding: several where PEFT keeps a trained copy.

    Args:
        lm: the language model.
        name: its name, for messages.

    Raises:
        NotImplementedError: one of them is not supported; the message says which and why.
    """
    embedding = lm.get_output_embeddings()
    if embedding is None:
        raise NotImplementedError(f"{name} has no output embedding (get_output_embeddings() gives None)")
    if isinstance(embedding, ModulesToSaveWrapper):
        heads = [embedding.original_module, *embedding.modules_to_save.values()]
    else:
        heads = [embedding]
    for head in heads:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        if type(head).__module__.startswith("peft."):
            check_adapter(head, name)
        elif type(head).forward is not nn.Linear.forward:
            raise NotImplementedError(
                f"the output embedding of {name} is a {kind}; only nn.Linear is supported"
                f"{_HOW_NOT_TO_QUANTIZE if _is_quantized(head) else ''}"
            )
        if "forward" in vars(head) and _forward_slot(head) == "forward" and not is_of_a_plan(head):
            raise NotImplementedError(
                f"the forward of the output embedding of {name} was replaced already, by {head.forward!r}; remove "
                "that first"
            )
    return heads


def check_adapter(head: nn.Module, name: str) -> None:
    """NotImplementedError where a layer of PEFT's, of the model ``name``, is more than low-rank updates."""
    base = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    if is_of_a_plan(base):
        raise NotImplementedError(
            f"{name} has a PEFT adapter on its output embedding, which tensor parallelism has cut over the vocabulary: "
            "take it out of target_modules"
        )
    reason = why_not_supported(head)
    if reason is not None:
        raise NotImplementedError(
            f"{name} has a PEFT adapter on its output embedding ({type(head).__module__}.{type(head).__name__}), "
            f"{reason}: take it out of target_modules, or name it in modules_to_save to train it whole"
        )


@contextlib.contextmanager
def swapped_forward(heads: Sequence[HeadLayer], forward: Callable[..., Tensor]) -> Iterator[None]:
    """``forward`` in the place of the layers' own, until the block ends; it is called with the layer in front."""
    slots = [(head, _forward_slot(head)) for head in heads]
    before = [vars(head).get(slot) for head, slot in slots]
    for head, slot in slots:
        setattr(head, slot, types.MethodType(forward, head))
    try:
        yield
    finally:
        for (head, slot), own in zip(slots, before, strict=True):
            if own is None:
                delattr(head, slot)
            else:
                setattr(head, slot, own)


def _is_quantized(head: nn.Module) -> bool:
    return type(head).__module__.startswith("bitsandbytes.")


def _forward_slot(head: nn.Module) -> str:
    """accelerate's device hooks keep a module's own forward under another name, and call it from theirs."""
    return "_old_forward" if hasattr(head, "_hf_hook") else "forward"
