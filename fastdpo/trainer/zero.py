"""What DeepSpeed, as accelerate sets it up, needs beside what ``Trainer`` does for the model that it trains."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from fastdpo.model.language_model import described, language_model

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

# Of modules, which keep them when an engine's hooks are gone, and have the next engine's backward use the old one.
_LEFT_BY_HOOKS = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt")


def zero_stage(accelerator: Accelerator) -> int | None:
    """DeepSpeed's stage: what of the model its processes divide among them; None without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return None if plugin is None else int(plugin.zero_stage)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether a parameter is one of ZeRO-3's, of which each process holds a part, and the parameter itself nothing."""
    return hasattr(tensor, "ds_id")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, unless ZeRO-3 has divided it."""
    return cast(Any, tensor).ds_tensor if is_partitioned(tensor) else tensor


def refuse_adapter_on_head(model: PreTrainedModel | PeftModel) -> None:
    """Raises where ZeRO-3 would divide a model with an adapter on its output embedding.

    DeepSpeed gathers weights in the order in which it has seen modules called, and we call the base and the adapter of
    that layer where its own forward would: it stops in the midst of a step, with an error of its tracing.

    Raises:
        NotImplementedError: the message says what to use.
    """
    lm = language_model(model)
    if is_deepspeed_zero3_enabled() and isinstance(lm.get_output_embeddings(), BaseTunerLayer):
        raise NotImplementedError(
            f"{described(lm)} has a PEFT adapter on its output embedding, which is not supported with DeepSpeed "
            "ZeRO-3: use ZeRO-2 or FSDP2, or take it out of target_modules"
        )


def inference_engine(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """``model``, which no optimiser has, in the precision of the one that is trained; with ZeRO-3 divided as that is.

    The other stages divide nothing that a forward needs. To be called by all processes.
    """
    import deepspeed  # where it is not installed, nothing here is called

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero["stage"] != 3:
        zero["stage"] = 0
    for name, value in _by_hidden_size(model).items():
        if zero.get(name) == "auto":
            zero[name] = value
    engine: nn.Module = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    return engine


def _by_hidden_size(model: Any) -> dict[str, int]:
    """What transformers puts in the place of "auto", once it has the model."""
    size = language_model(model).config.get_text_config().hidden_size
    return {
        "reduce_bucket_size": size * size,
        "stage3_prefetch_bucket_size": int(0.9 * size * size),
        "stage3_param_persistence_threshold": 10 * size,
    }


def let_go(engine: Any) -> None:
    """Takes an inference engine off its model, for which another can then be made; what it divided stays divided."""
    engine.empty_partition_cache()
    engine.destroy()
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        if (handle := getattr(engine, name, None)) is not None:
            handle.remove()
    for module in engine.module.modules():
        for name in _LEFT_BY_HOOKS:
            module.__dict__.pop(name, None)


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], *, keeps: bool = False) -> Iterator[None]:
    """Every process has the whole of these parameters until the block ends. To be entered by all processes.

    ``keeps``: what the first of them makes of the parameters is theirs afterwards.
    """
    divided = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if keeps else None):
        yield


def of_whole(tensors: Mapping[str, Tensor], work: Callable[[Tensor], T]) -> dict[str, T]:
    """name -> what ``work`` finds of each tensor, whole; one is gathered at a time. To be called by all processes."""
    found = {}
    for name, tensor in tensors.items():
        with gathered([tensor]):
            found[name] = work(tensor.detach())
    return found


def copied(model: M) -> M:
    """A copy of a model, whole in every process, also where ZeRO-3 has divided the model itself."""
    with gathered(model.parameters()):
        return copy.deepcopy(model)


@contextlib.contextmanager
def whole_weights(engine: Any) -> Iterator[None]:
    """``Trainer.save_model`` brings ZeRO-3's weights together in the main process, until the block ends.

    It does so by itself where the configuration says so (stage3_gather_16bit_weights_on_model_save), and writes
    DeepSpeed's own files otherwise.
    """
    zero = engine._config.zero_config
    before = zero.gather_16bit_weights_on_model_save
    zero.gather_16bit_weights_on_model_save = True
    try:
        yield
    finally:
        zero.gather_16bit_weights_on_model_save = before


def input_dtype(accelerator: Accelerator) -> torch.dtype:
    """What a model's own inputs, such as pixels, are given in."""
    dtype: torch.dtype = accelerator.state.deepspeed_plugin.hf_ds_config.dtype()
    return dtype


def catch_up(engine: Any) -> None:
    """Brings DeepSpeed's Adam on the CPU, which offloading takes, to the step of the state that was loaded into it.

    It holds the powers of its betas outside of its state, multiplied up step by step; at a step that does not follow
    the last one it takes them from ``pow``, whose last bits are others, and so are a resumed run's steps.
    """
    optimizer: Any = engine.basic_optimizer
    if type(optimizer).__name__ != "DeepSpeedCPUAdam":
        return
    done = max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)
    group, nothing = optimizer.param_groups[0], torch.empty(0)
    beta1, beta2 = group["betas"]
    for step in range(1, done + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id,
            step,
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["bias_correction"],
            *(nothing,) * 4,
        )
