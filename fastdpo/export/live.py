"""Adapters on their base as they are used, before they are merged: all of them loaded, and nothing passed over."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from fastdpo.data.terms import first_line
from fastdpo.errors import InputError
from fastdpo.model.adapter_vocabulary import adapter_shapes
from fastdpo.model.adapters import is_adapter, put_on
from fastdpo.model.auto_class import auto_class_of
from fastdpo.model.quantization import keep_as_trained, make_quantization_config
from fastdpo.trainer.manifest import name_some, read_manifest
from fastdpo.trainer.resume_settings import QUANTIZATION

_OF_VISION = ("language_model.", "vision", "visual")


class MergeError(InputError):
    """An adapter that is not merged; the message says why, and what to do."""


@dataclass(frozen=True)
class Source:
    """What is merged.

    Attributes:
        adapters: names of adapters of one base, whose sum is merged; empty for a model by itself.
        base: the name of the base, or of the model.
        revision: of the base on the Hub.
        quantization: of the base, as ``fastdpo.model.quantization.quantization_of`` tells it; empty for none.
        images: the base is loaded as a model that takes images.
        named_bases: what each adapter names as its base; empty for nothing.
    """

    adapters: tuple[str, ...]
    base: str
    revision: str | None = None
    quantization: tuple[tuple[str, Any], ...] = ()
    images: bool = False
    named_bases: tuple[str, ...] = ()


def source_of(
    names: Sequence[str], *, base: str | None = None, load_in_4bit: bool | None = None, quant_type: str = "nf4"
) -> Source:
    """What a list of names is: adapters of one base, or a model.

    Args:
        names: folders or Hub ids.
        base: in the place of the base that adapters name.
        load_in_4bit: the base is that in 4 bits; None for as the run had it, where the folder tells.
        quant_type: with ``load_in_4bit``.

    Raises:
        MergeError: they are of different bases, of a kind that cannot be merged, or name none.
    """
    adapters = [name for name in names if is_adapter(name)]
    if not adapters:
        if len(names) > 1:
            raise MergeError(f"{names[0]} and {names[1]} are no adapters; name one model, or adapters of one base")
        return Source((), names[0])
    if others := [name for name in names if name not in adapters]:
        raise MergeError(f"{others[0]} is no adapter; the base of an adapter is named by the adapter, or --base_model")
    if twice := [name for name in adapters if [_place(other) for other in adapters].count(_place(name)) > 1]:
        raise MergeError(f"{twice[0]} is named twice; merged with itself it would do twice what it was trained to")
    configs = [PeftConfig.from_pretrained(name) for name in adapters]
    for name, config in zip(adapters, configs, strict=True):
        if why := _why_not_merged(config):
            raise MergeError(f"{name} {why}")
    bases = {config.base_model_name_or_path or "" for config in configs}
    if base is None:
        if len(bases) > 1:
            raise MergeError(f"the adapters are of different bases: {', '.join(sorted(bases))}; --base_model names one")
        (base,) = bases
    if not base:
        raise MergeError(f"the adapter {adapters[0]} does not say what it was trained on; name it by --base_model")
    if is_adapter(base):
        raise MergeError(
            f"{adapters[0]} was trained on {base}, which is an adapter too; merge that one into its base first "
            f"(fastdpo merge {base} --output_dir FOLDER), and name the folder by --base_model"
        )
    quantization: dict[str, Any] = {}
    if load_in_4bit:
        quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": quant_type}
    elif load_in_4bit is None:
        quantization = next((known for name in adapters if (known := _recorded(name))), {})
    if quantization.get("load_in_8bit"):
        raise MergeError(
            f"{adapters[0]} was trained on a base in 8 bits, whose layers round what goes into them as well, so that "
            "no merged weights would do the same. With --no-load_in_4bit it is merged into the base's own weights, "
            "which is another model"
        )
    shapes = adapter_shapes(adapters[0])
    return Source(
        tuple(adapters),
        base,
        configs[0].revision,
        tuple(quantization.items()),
        images=any(word in key for key in shapes for word in _OF_VISION),
        named_bases=tuple(config.base_model_name_or_path or "" for config in configs),
    )


def _place(name: str) -> str:
    """One name of a folder, however it is written."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _recorded(name: str) -> dict[str, Any]:
    """How the base of the run that left the folder was quantised, where it says so."""
    manifest = read_manifest(Path(name)) if Path(name).is_dir() else None
    known = manifest.settings.get(QUANTIZATION) if manifest is not None else None
    return known if isinstance(known, dict) else {}


def _why_not_merged(config: PeftConfig) -> str | None:
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if config.is_prompt_learning:
        return f"is of the kind {kind}, which is put before the prompt, and not into weights: it cannot be merged"
    if getattr(config, "alora_invocation_tokens", None):
        return "is an activated LoRA (aLoRA), which is on after certain tokens alone: no merged weights do that"
    return None


def load_base(source: Source, device: str, *, trust_remote_code: bool = False, dequantize: bool = False) -> Any:
    """The base in float32, its quantised weights as they are in use, or, with ``dequantize``, as their values are.

    Raises:
        MergeError: it cannot be loaded, or its quantisation cannot be undone.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.revision is not None:
        options["revision"] = source.revision
    if source.quantization:
        known = dict(source.quantization)
        options["quantization_config"] = make_quantization_config(
            4,
            compute_dtype=torch.float32,
            quant_type=known.get("bnb_4bit_quant_type", "nf4"),
            nested=bool(known.get("bnb_4bit_use_double_quant")),
        )
        options["device_map"] = {"": device}
    try:
        auto = auto_class_of(source.base, images=source.images, **options)
        model: PreTrainedModel = auto.from_pretrained(source.base, dtype=torch.float32, **options)
    except (OSError, HFValidationError) as error:
        raise _not_loaded(source, error) from error
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        if getattr(model, "is_loaded_in_8bit", False):
            raise MergeError(
                f"{source.base} is in 8 bits, and its layers round what goes into them as well, so that no merged "
                "weights would do the same; merge into the model that it was made from (--base_model)"
            )
        if dequantize:
            model = _dequantized(model, source.base)
        else:
            keep_as_trained(model)
    if not source.quantization:
        cast(nn.Module, model).to(device)
    return model.eval()


def _not_loaded(source: Source, error: Exception) -> MergeError:
    said = f"cannot be loaded ({first_line(str(error))})"
    if source.base in source.named_bases:
        name = source.adapters[source.named_bases.index(source.base)]
        return MergeError(f"{source.base}, which {name} was trained on, {said}. --base_model says where it is")
    return MergeError(f"{source.base} {said}")


def _dequantized(model: PreTrainedModel, name: str) -> PreTrainedModel:
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "")
    try:
        model.dequantize(dtype=torch.float32)
    except (NotImplementedError, ValueError) as error:
        raise MergeError(
            f"{name} is quantised by {getattr(method, 'value', method)}, which transformers cannot undo: merge into "
            "the model that it was made from (--base_model)"
        ) from error
    model.float()
    return model


def is_quantized(model: Any) -> bool:
    """Whether a base holds quantised weights now."""
    return bool(getattr(model, "is_quantized", False))


def put_adapters_on(base: PreTrainedModel, names: Sequence[str]) -> PeftModel:
    """All adapters on their base, active together.

    Raises:
        MergeError: a tensor of an adapter has no place in the model, or one that the model needs is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings, which are seen to
        warnings.filterwarnings("error", message="(?s).*Found missing adapter keys")
        try:
            model = put_on(base, names[0])
            for number, name in enumerate(names[1:], 1):
                result = model.load_adapter(name, adapter_name=f"adapter{number}")
                if result.missing_keys:
                    raise MergeError(f"{name} lacks what its configuration names: {name_some(result.missing_keys)}")
        except UserWarning as error:
            raise MergeError(f"{names[0]} lacks what its configuration names: {error}") from error
        except (RuntimeError, ValueError) as error:
            raise MergeError(f"{' and '.join(names)} cannot be loaded on the base: {_in_a_line(error)}") from error
    active = ["default", *(f"adapter{number}" for number in range(1, len(names)))]
    for name, own in zip(names, active, strict=True):
        _refuse_unplaced(model, name, own)
    if len(active) > 1:
        try:
            cast(Any, model.base_model).set_adapter(active)
        except (ValueError, TypeError) as error:
            raise MergeError(f"{' and '.join(names)} cannot be active together: {_in_a_line(error)}") from error
    return model.eval()


def _refuse_unplaced(model: PeftModel, name: str, own: str) -> None:
    result: Any = set_peft_model_state_dict(model, load_peft_weights(name, device="cpu"), adapter_name=own)
    # What PEFT writes a second time: of modules in modules_to_save whose rows were resized, and of tied embeddings.
    twice = (".original_module.", ".modules_to_save.", ".token_adapter.")
    unplaced = [key for key in result.unexpected_keys if not any(word in key for word in twice)]
    if unplaced:
        raise MergeError(
            f"{name} has tensors that the base has no place for: {name_some(unplaced)}. It was trained on another "
            "model; --base_model names the base"
        )


def dtype_on_disk(source: Source, *, trust_remote_code: bool = False) -> torch.dtype:
    """What the base's weights are stored in, as its configuration says; float32 where it does not.

    Raises:
        MergeError: it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(source.base, revision=source.revision, trust_remote_code=trust_remote_code)
    except (OSError, HFValidationError) as error:
        raise _not_loaded(source, error) from error
    for found in (config, config.get_text_config()):
        dtype = getattr(found, "dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return torch.float32


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:600]
