"""Mixtures of experts whose experts transformers spreads over processes: refused, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from fastdpo.model.language_model import described, language_model

_SETTING = "distributed_config"  # of from_pretrained, which leaves it in the model's configuration
_OLD_FLAG = "enable_expert_parallel"  # which transformers makes an ep_size of


def refuse_expert_parallel(
    models: Mapping[str, str | PreTrainedModel | PeftModel | None], init_kwargs: Mapping[str, Any]
) -> None:
    """Raises where one of ``models``, by what they are called, is or would be loaded expert-parallel.

    Its processes meet in every layer of a forward, and each holds other experts: what looks at the model, copies it for
    the reference or saves it would need all of them, and batches that are taken in parts would leave them waiting.

    Args:
        models: as the trainer was given them, a name or path, or a model; None for none.
        init_kwargs: what those that are given by name are loaded with.

    Raises:
        NotImplementedError: the message says what to use.
    """
    for called, model in models.items():
        if model is None:
            continue
        if isinstance(model, str):
            size, name = _experts_over(init_kwargs.get(_SETTING)), model
        else:
            lm = language_model(model)
            loaded = getattr(lm, "is_distributed_loading_by_transformers", False)
            size, name = _experts_over(getattr(lm.config, _SETTING, None)) if loaded else None, described(lm)
        if size is not None:
            raise NotImplementedError(
                f"{called}, {name}, is expert-parallel (distributed_config with {size}), and experts that are spread "
                "over processes are not supported. Load it without, and have its weights sharded by FSDP2, experts and "
                "all (accelerate launch --use_fsdp --fsdp_version 2 -m fastdpo train …); or, where a device holds all "
                "of it, train a copy a process (accelerate launch), or an adapter on it (--use_peft)"
            )


def _experts_over(setting: Any) -> str | None:
    """By what the setting asks for expert parallelism, in words; None where it does not."""

    def asked(name: str) -> Any:
        return setting.get(name) if isinstance(setting, Mapping) else getattr(setting, name, None)

    size = asked("ep_size")
    if size is not None and size > 1:
        return f"ep_size={size}"
    return f"{_OLD_FLAG}=True" if asked(_OLD_FLAG) and size is None else None
