"""The models of an evaluation, one after another; a base is loaded once, and its adapters take their turns on it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft import PeftConfig, PeftModel, PeftType
from torch import nn
from transformers import PreTrainedModel

from fastdpo.data.terms import first_line
from fastdpo.model.adapters import base_of_adapter, put_on
from fastdpo.model.randomness import disable_dropout
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.finite_runs import refuse_not_finite
from fastdpo.trainer.models import fix_frequencies_of, hub_options_of, load_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """What a model is made of.

    Attributes:
        base: name of the model; of a folder, its path.
        adapter: name of an adapter on it; None for none.
    """

    base: str
    adapter: str | None = None

    @property
    def source(self) -> str:
        """The name that it was asked for by."""
        return self.base if self.adapter is None else self.adapter


def weights_of(name: str, args: DPOConfig) -> Weights:
    """What the model or adapter of this name is made of.

    Raises:
        ValueError: an adapter does not say what it was trained on, or names a folder that is not there.
    """
    hub = hub_options_of(args)
    base = base_of_adapter(name, **hub)
    if base is None:
        return Weights(_same_name(name))
    if not base:
        raise ValueError(
            f"the adapter {name} does not say what it was trained on; write base_model_name_or_path into it"
        )
    if base.startswith((".", "/", "~")) and not Path(base).expanduser().is_dir():
        raise ValueError(
            f"the adapter {name} was trained on {base}, and there is no such folder; write where it is into the "
            "adapter's adapter_config.json (base_model_name_or_path)"
        )
    return Weights(_same_name(base), _same_name(name))


def _same_name(name: str) -> str:
    """One name for a folder, however it is written, so that a base is known again."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def in_turn(
    wanted: Sequence[Weights], args: DPOConfig, *, images: bool
) -> Iterator[tuple[Weights, PreTrainedModel | PeftModel]]:
    """Each of these once, in evaluation mode, on the device; by base, the base itself first, and then its adapters.

    A model is as it was given out until the next one is asked for. One base is in memory at a time; it is loaded anew
    after an adapter that does not leave it as it was.

    Raises:
        ValueError, OSError: a model or adapter is not there, or cannot be read.
        InputError: a weight is not finite.
    """
    for base in dict.fromkeys(weights.base for weights in wanted):
        of_base = sorted({weights for weights in wanted if weights.base == base}, key=lambda w: w.adapter or "")
        model: PreTrainedModel | None = None
        for weights in of_base:
            if model is None:
                try:
                    model = _load(weights.base, args, images=images)
                except OSError as error:
                    trained = [weights.adapter for weights in of_base if weights.adapter is not None]
                    of = f", which the adapter {trained[0]} was trained on," if trained else ""
                    raise OSError(f"{base}{of} cannot be loaded: {first_line(str(error))}") from error
            if weights.adapter is None:
                yield weights, model
                continue
            embeddings = _embeddings(model)
            adapted = put_on(model, weights.adapter, **hub_options_of(args))
            refuse_not_finite({f"the adapter {weights.adapter}": adapted})
            disable_dropout(adapted)  # of its own: a model that looks random is laid out with care, and named
            yield weights, adapted.to(args.device).eval().requires_grad_(False)
            comes_back = leaves_its_base(adapted.peft_config["default"]) and _embeddings(model) == embeddings
            model = adapted.unload() if comes_back else None
            del adapted
        model = None
        gc.collect()  # before the next one takes its place


def leaves_its_base(config: PeftConfig) -> bool:
    """Whether a base is what it was once this adapter is taken off: biases that it brought would stay, and so would the
    residue of the weights that some kinds (PiSSA, OLoRA, CorDA …) are begun with."""
    return (
        config.peft_type == PeftType.LORA
        and getattr(config, "bias", None) == "none"
        and getattr(config, "init_lora_weights", None) in (True, False, "gaussian")
        and getattr(config, "layer_replication", None) is None
    )


def _embeddings(model: PreTrainedModel) -> int:
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    return int(embedding.weight.shape[0])


def _load(name: str, args: DPOConfig, *, images: bool) -> PreTrainedModel:
    model = load_model(name, args, images=images)
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{name}, which an adapter was trained on, is an adapter too; merge that one into its base first "
            "(fastdpo merge), and write the folder into base_model_name_or_path"
        )
    refuse_not_finite({f"the model {name}": model})
    disable_dropout(model)
    fix_frequencies_of([model], args)
    if getattr(model, "hf_device_map", None) is None and not getattr(model, "is_quantized", False):
        model = nn.Module.to(model, args.device)
    evaluated: PreTrainedModel = model.eval().requires_grad_(False)
    return evaluated
