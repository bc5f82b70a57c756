"""What to do where memory does not suffice: the settings that would save some, and are not in use yet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from fastdpo.logps.out_of_memory import is_out_of_memory
from fastdpo.trainer.config import DPOConfig


def memory_advice(
    args: DPOConfig,
    *,
    training: bool,
    has_reference_model: bool,
    has_adapter: bool,
    is_sharded: bool = False,
    is_stream: bool = False,
    takes_parts: bool = True,
    can_checkpoint: bool = True,
) -> list[str]:
    """What would save memory, what costs least first, each with its flag; none that the run would be refused.

    Args:
        args: the run's.
        training: in a training step, not in an evaluation.
        has_reference_model: whether a reference model is held beside the policy.
        has_adapter: whether an adapter is trained, not the whole model.
        is_sharded: whether by FSDP or DeepSpeed, with which activations are not offloaded.
        is_stream: whether training rows are read as they are needed, of which no reference is asked beforehand.
        takes_parts: whether a batch can be taken in parts.
        can_checkpoint: whether the model has gradient checkpointing.
    """
    name = "per_device_train_batch_size" if training else "per_device_eval_batch_size"
    size, budget = getattr(args, name), args.max_tokens_per_batch
    advice = []
    if budget is not None:
        advice.append(f"--max_tokens_per_batch below {budget}: smaller parts of the same batch")
    elif size > 1 and takes_parts and args.is_divisible:
        tokens = f", such as {args.max_length}" if args.max_length else ""
        advice.append(f"--max_tokens_per_batch{tokens}: takes the same batch in parts")
    if has_reference_model and not (is_stream or args.sync_ref_model):
        advice.append(
            "--precompute_ref_log_probs, or --ref_cache FOLDER: asks the reference once, and frees it before training"
        )
    if training and can_checkpoint and not args.activation_checkpointing:
        advice.append("--gradient_checkpointing: recomputes activations in the backward")
    cannot_offload = is_sharded or args.torch_compile or args.device.type == "cpu"
    if training and not (args.activation_offloading or cannot_offload):
        advice.append("--activation_offloading: keeps activations in the host's memory")
    if size > 1 and training:
        steps = args.gradient_accumulation_steps
        same = f" with --gradient_accumulation_steps above {steps}" + (": the same steps" if args.is_divisible else "")
        advice.append(f"--{name} below {size}{same}")
    elif size > 1:
        advice.append(f"--{name} below {size}: the same metrics")
    shorter = "set" if args.max_length is None else f"below {args.max_length}"
    advice.append(f"--max_length {shorter}: cuts longer sequences")
    if not has_adapter:
        advice.append("--use_peft: trains an adapter, whose gradients and optimiser states are small")
    return advice


@contextlib.contextmanager
def advising(doing: str, advice: Callable[[], list[str]]) -> Iterator[None]:
    """Says what would save memory where it does not suffice in the block.

    Args:
        doing: what is done there, in words.
        advice: asked then alone; :func:`memory_advice` of the run.

    Raises:
        torch.OutOfMemoryError: in the place of torch's own error, which it is chained to.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        lines = "".join(f"\n  {line}" for line in advice())
        raise torch.OutOfMemoryError(f"{error}\nMemory did not suffice for {doing}. What needs less:{lines}") from error
