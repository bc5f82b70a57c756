"""What shards a run's model over processes, as its arguments and its launcher say, and what cannot be had with that."""

from __future__ import annotations

import os

from accelerate import DistributedType
from accelerate.utils import str_to_bool
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from fastdpo.trainer.config import DPOConfig

# What accelerate makes of processes among which it has no FSDP, though it was told to.
_WITHOUT_FSDP = (DistributedType.NO, DistributedType.MULTI_CPU)


def asked_engine(args: DPOConfig) -> str | None:
    """What of accelerate the run, or its launcher, was told to shard models with: FSDP, DeepSpeed, or nothing."""
    if args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return "FSDP"
    return "DeepSpeed" if args.deepspeed_plugin is not None else None


def engine_of(args: DPOConfig) -> str | None:
    """What of accelerate will shard the run's models, known before there are any: FSDP, DeepSpeed, or nothing."""
    asked, kind = asked_engine(args), args.distributed_state.distributed_type
    shards_nothing = (DistributedType.MULTI_CPU,) if asked == "DeepSpeed" else _WITHOUT_FSDP
    return None if kind in shards_nothing else asked


def weights_come_later(args: DPOConfig) -> bool:
    """With ZeRO-3 and FSDP, processes may hold nothing of the model before the training loop has sharded it."""
    return bool(is_deepspeed_zero3_enabled() or args.fsdp or is_fsdp_enabled())


def check_distribution(args: DPOConfig, kind: str | None, *, is_cut: bool = False) -> None:
    """Raises for what is not supported on several devices.

    Args:
        args: the run's.
        kind: what shards the model over processes, FSDP or DeepSpeed; None where each holds all of it.
        is_cut: processes have parts of layers or of sequences.

    Raises:
        NotImplementedError: the message says what to use.
    """
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"{args.n_gpu} devices are visible to one process, for which Trainer uses nn.DataParallel. Start one "
            "process per device (torchrun, accelerate launch), or show it one (CUDA_VISIBLE_DEVICES)"
        )
    if kind and is_cut and args.max_tokens_per_batch is not None:
        raise NotImplementedError(
            f"max_tokens_per_batch is not supported with {kind} where layers or sequences are cut over processes, too. "
            "Use a smaller per_device_train_batch_size, with gradient_accumulation_steps"
        )


def refuse_moving_reference(args: DPOConfig, what: str) -> None:
    """Raises where the reference would follow a policy that was cut into parts as it was loaded.

    Args:
        args: the run's.
        what: the policy, in words.

    Raises:
        NotImplementedError: the run has sync_ref_model.
    """
    if args.sync_ref_model:
        raise NotImplementedError(
            f"sync_ref_model is not supported with {what}. Train with FSDP2 or DeepSpeed, which shard whole models as "
            "the training begins, or on processes that each hold all of the model (DDP), or leave it out"
        )


def refuse_mixed_images(kind: str | None) -> None:
    """Raises where some rows have images and others none, and processes have to run every module equally often.

    Args:
        kind: as for :func:`check_distribution`.

    Raises:
        NotImplementedError: something shards the model.
    """
    if kind:
        raise NotImplementedError(
            f"rows without images among rows with images are not supported with {kind}, nor a stream of rows with "
            "images, of which nobody knows whether all have some: its processes must run the vision tower equally "
            "often, and would wait for each other for ever. Train on either kind at a time, and leave streaming out"
        )
