"""Parts of models and of sequences: what a run loads for them, what it can have, and what is said where it cannot.

The parallelism is transformers' and accelerate's. A model is cut where it is loaded (``DistributedConfig``, or
``tp_plan``), and accelerate's ``ParallelismConfig`` says which processes have the same data.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, DistributedType, ParallelismConfig
from accelerate.utils import TorchContextParallelConfig, str_to_bool
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from fastdpo.data.share import DataShare
from fastdpo.model.attention import RowAttention
from fastdpo.model.cut_heads import HeadCutAttention
from fastdpo.model.cut_rows import CutAttention
from fastdpo.model.cut_weights import CUTS
from fastdpo.model.language_model import described, language_model
from fastdpo.model.load_balancing import calls_known_function
from fastdpo.model.load_sharding import is_load_sharded, sizes_of
from fastdpo.model.packing_choice import Packing
from fastdpo.model.router_loss import may_have_router_loss, router_loss_coef
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.engines import asked_engine, check_distribution, refuse_moving_reference

# What accelerate makes of processes for which it has no device meshes.
_WITHOUT_MESHES = (DistributedType.MULTI_CPU,)

_HOW = (
    "give the model's name or path, which is then loaded so; or load it with "
    "from_pretrained(..., distributed_config=DistributedConfig(tp_size=..., fsdp_size=...))"
)

# What accelerate's setting of DeepSpeed's sequence parallelism is by default, here and in its launcher.
_SP_ATTENTION = (None, "sdpa")

# In accelerate's words, what ranks of cp_size exchange where they attend by heads.
_BY_HEADS = "alltoall"


def config_of(args: DPOConfig) -> ParallelismConfig | None:
    """What the run, or ``accelerate launch``, was told of parallelism; None for nothing.

    accelerate leaves ``sp_size`` to DeepSpeed, its data and its groups. What is needed here is what it has for
    ``cp_size``, which is therefore in its place.
    """
    config = _told(args)
    if config is None or not config.sp_enabled:
        return config
    return ParallelismConfig(
        dp_replicate_size=config.dp_replicate_size,
        dp_shard_size=config.dp_shard_size,
        tp_size=config.tp_size,
        cp_size=config.sp_size,
        cp_handler=TorchContextParallelConfig(_BY_HEADS),
        sp_size=1,
    )


def _told(args: DPOConfig) -> ParallelismConfig | None:
    if args.parallelism_config is not None:
        return args.parallelism_config
    asked = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false")
    return ParallelismConfig() if str_to_bool(asked) else None


def settle_sequences(args: DPOConfig) -> None:
    """Has accelerate make what :func:`config_of` says, where it was told of ``sp_size``; before ``Trainer`` is made.

    Raises:
        NotImplementedError: DeepSpeed's settings of it were given.
    """
    told = _told(args)
    if told is None or not told.sp_enabled:
        return
    if (asked := told.sp_handler.sp_attn_implementation) not in _SP_ATTENTION:
        raise NotImplementedError(
            f"sp_attn_implementation is {asked}, which is for DeepSpeed's sequence parallelism; give "
            "attn_implementation (--attn_implementation)"
        )
    args.parallelism_config = config_of(args)


def data_ranks(args: DPOConfig, model: PreTrainedModel | PeftModel | None = None) -> int:
    """How many processes have data of their own; ``model`` where it may have been cut by itself."""
    config, sizes = config_of(args), {} if model is None else sizes_of(model)
    copies = sizes.get("tp", 1 if config is None else config.non_data_parallel_size)
    ranks: int = args.world_size // copies
    return ranks


def loading_kwargs(args: DPOConfig) -> dict[str, Any]:
    """What ``from_pretrained`` takes beside ``args.model_init_kwargs`` to cut the model as the run was told."""
    config = config_of(args)
    if config is None or not config.tp_enabled or any(name in args.init_kwargs for name in CUTS):
        return {}
    return {
        "distributed_config": DistributedConfig(
            tp_size=config.tp_size, tp_plan="auto", fsdp_size=config.dp_shard_size * config.dp_replicate_size
        )
    }


def check_parallelism(
    policy: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | PeftModel | None,
    args: DPOConfig,
) -> None:
    """Raises for what is not supported with models that are cut over processes, or are to be.

    Args:
        policy: what is trained.
        ref_model: the reference's own model.
        args: the run's.

    Raises:
        ValueError: the models are not cut alike, or otherwise than the run was told.
        NotImplementedError: the message says what to use.
    """
    config, sizes = config_of(args), sizes_of(policy)
    cuts = sizes.get("tp", 1) > 1 or (config is not None and config.total_size > 1)
    if cuts and args.distributed_state.distributed_type in _WITHOUT_MESHES:
        raise NotImplementedError(
            "tensor and context parallelism are not supported among processes of a CPU, for which accelerate has no "
            "device meshes; start the run on GPUs, without use_cpu"
        )
    if config is not None and config.tp_enabled and not sizes:
        raise ValueError(f"tp_size is {config.tp_size} in the run's ParallelismConfig, and the model is whole: {_HOW}")
    if ref_model is not None and sizes_of(ref_model) != sizes and (sizes_of(ref_model) or sizes["tp"] > 1):
        raise ValueError(
            "model and ref_model are not cut over processes alike: load both with the same DistributedConfig, or leave "
            "ref_model out and give model by its name or path"
        )
    if config is not None and config.cp_enabled and not sizes:
        _check_cutting(policy, config, args)
    if sizes:
        _check_cut(config, sizes, args)


def _check_cut(config: ParallelismConfig | None, sizes: dict[str, int], args: DPOConfig) -> None:
    """The same, of a policy that ``from_pretrained`` cut into these sizes; raises what it does."""
    what = f"a model that from_pretrained cut over processes ({', '.join(f'{k}={v}' for k, v in sizes.items())})"
    engine = asked_engine(args)
    if engine is not None:
        raise NotImplementedError(
            f"{what} is not supported with accelerate's {engine}, which would cut it again. Leave {engine} out of "
            "accelerate's configuration, and give fsdp_size beside tp_size to DistributedConfig"
        )
    if sizes["pp"] > 1:
        raise NotImplementedError(f"{what} is not supported with pipeline parallelism; use tp_size and fsdp_size")
    if config is not None and config.cp_enabled:
        raise NotImplementedError(f"{what} is not supported with {_asked(config)[0]}; use one of them")
    if config is not None and config.tp_size not in (1, sizes["tp"]):
        raise ValueError(f"tp_size is {config.tp_size} in the run's ParallelismConfig, and the model has {sizes['tp']}")
    refuse_moving_reference(args, what)
    if sizes["dp"] > 1:
        check_distribution(args, "FSDP", is_cut=True)
    if args.torch_compile:
        raise NotImplementedError(f"torch_compile is not supported with {what}; leave it out")


def cuts_sequences(args: DPOConfig) -> bool:
    """Whether processes are to have parts of sequences."""
    config = config_of(args)
    return config is not None and config.cp_enabled


def cut_ranks(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """The ranks that sequences are cut over, this process among them; None where they are whole."""
    config = accelerator.parallelism_config
    if config is None or not config.cp_enabled:
        return None
    ranks: dist.ProcessGroup = accelerator.torch_device_mesh["cp"].get_group()
    return ranks


def takes_packed_rows(accelerator: Accelerator) -> bool:
    """Whether sequences are whole, or are cut for all but the attention."""
    config = accelerator.parallelism_config
    return config is None or not config.cp_enabled or _by_heads(config)


def _by_heads(config: ParallelismConfig) -> bool:
    return bool(config.cp_enabled and config.cp_handler.cp_comm_strategy == _BY_HEADS)


def _asked(config: ParallelismConfig) -> tuple[str, str]:
    """By which option sequences are cut, and how."""
    name = "sp_size" if _by_heads(config) else "cp_size"
    return name, f"{name}={config.cp_size}"


def keep_attention(accelerator: Accelerator) -> None:
    """Has accelerate leave the attention of models as it is; to be called before any model is prepared.

    For its own context parallelism it takes the masks from every attention, for good, and so refuses sliding windows.
    """
    if cut_ranks(accelerator) is not None:
        accelerator._prepare_cp = lambda *args: args


def attention_of(
    model: PreTrainedModel | PeftModel, packing: Packing, accelerator: Accelerator
) -> RowAttention | CutAttention | HeadCutAttention | None:
    """What ``model`` needs to take a run's batches."""
    if cut_ranks(accelerator) is None:
        return packing.attention_of(model)
    if takes_packed_rows(accelerator):
        return HeadCutAttention(model, packing.attention_of(model))
    return CutAttention(model)


def _check_cutting(policy: PreTrainedModel | PeftModel, config: ParallelismConfig, args: DPOConfig) -> None:
    """Raises for what is not supported with sequences that are cut over processes.

    Raises:
        ValueError: nothing would cut them.
        NotImplementedError: the message says what to leave out.
    """
    _, what = _asked(config)
    if asked_engine(args) != "FSDP":
        raise ValueError(
            f"{what} cuts sequences over processes, which is done with FSDP2 alone: start the run with it "
            "(accelerate launch --use_fsdp --fsdp_version 2)"
        )
    lm = language_model(policy)
    coef = args.router_aux_loss_coef
    if may_have_router_loss(lm) and (router_loss_coef(lm) if coef is None else coef) and not calls_known_function(lm):
        raise NotImplementedError(
            f"{described(lm)} computes its load-balancing loss, which is of a batch's tokens, in a way of its own. "
            f"That is not supported with {what}: give router_aux_loss_coef 0, or use processes that have whole rows"
        )
    if args.torch_compile:
        raise NotImplementedError(f"torch_compile is not supported with {what}; leave it out")


def refuse_copy(policy: PreTrainedModel | PeftModel) -> None:
    """Raises where a copy of the policy would have to be the reference, and it is cut over processes.

    A copy, where torch makes one at all, would keep the forwards that the plan put into the policy's modules.

    Raises:
        NotImplementedError: it is; the message says what to use.
    """
    if is_load_sharded(policy):
        raise NotImplementedError(
            "model is cut over processes (a DistributedConfig or tp_plan), and cannot be copied to be the reference: "
            "give its name or path, which is loaded twice; or a ref_model that is loaded in the same way; or "
            "precompute_ref_log_probs; or a new adapter (peft_config), whose reference is the model without it"
        )


def gathered_once(accelerator: Accelerator, of_rows: Tensor) -> Tensor:
    """What all processes have of an evaluation's batch, row by row; of those that have the same rows, once.

    The rows that the last batch repeats, to give every process as many, are cut off.
    """
    share = DataShare.of(accelerator)
    if share.copies == 1:
        gathered: Tensor = accelerator.gather_for_metrics(of_rows)
        return gathered
    rows = share.once(accelerator.gather(of_rows))
    state = accelerator.gradient_state
    return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows


def check_images_cut(accelerator: Accelerator, *, has_images: bool) -> None:
    """Raises where rows with images would be cut over processes.

    Raises:
        NotImplementedError: they would.
    """
    if has_images and cut_ranks(accelerator) is not None:
        name, _ = _asked(accelerator.parallelism_config)
        raise NotImplementedError(f"rows with images are not supported with {name}; use processes that have whole rows")
