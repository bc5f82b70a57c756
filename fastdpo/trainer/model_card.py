"""The model card (README.md) of a trained model or adapter, with the metadata that the Hub reads."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel

from fastdpo.data.files import FILE_FORMATS
from fastdpo.data.visible import code_span, in_markdown, visible_line
from fastdpo.loss.options import LossOptions
from fastdpo.model.language_model import language_model
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.parallelism import data_ranks
from fastdpo.trainer.secrets import redacted
from fastdpo.trainer.whole_files import whole_or_not_at_all

CARD_FILE = "README.md"
TAGS = ("dpo", "fastdpo")
# What is between these lines is ours, and written anew each time; everything else in a card stays.
_BEGIN, _END = "<!-- fastdpo: begin -->", "<!-- fastdpo: end -->"
# PEFT's card is a form of which this is all the contents.
_BLANK = "[More Information Needed]"

_RESULTS = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "rewards/top1": "best answers with the highest reward",
    "rewards/kendall_tau": "Kendall's tau of rewards and ranks",
    "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected",
}
_SETTINGS = (
    "max_length",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
_CITATION = """\
```bibtex
@inproceedings{rafailov2023direct,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon
               and Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  url       = {https://arxiv.org/abs/2305.18290}
}
```"""


@dataclass(frozen=True)
class CardFacts:
    """What a card tells of a run.

    Attributes:
        args: its settings.
        model: what was trained; a ``PeftModel`` where it is an adapter.
        epochs, steps: how long.
        log_history: the entries of its log.
        has_chat_template: prompts are messages.
        takes_images: it is a vision-language model, with a processor.
        are_groups: the rows are groups of answers, and not pairs.
    """

    args: DPOConfig
    model: PreTrainedModel | PeftModel
    epochs: float | None
    steps: int
    log_history: Sequence[dict[str, Any]]
    has_chat_template: bool
    takes_images: bool = False
    are_groups: bool = False

    @property
    def base(self) -> str:
        """Name or path of what was trained further; empty for a model made in memory."""
        name: str = language_model(self.model).config._name_or_path
        return name


def write_model_card(
    facts: CardFacts,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Sequence[str] | None = None,
    language: str | None = None,
    license: str | None = None,
) -> Path:
    """Write README.md into the output folder; a card that is there (PEFT's, or somebody's own) is added to.

    Args:
        facts: of the run.
        model_name: by default the folder's.
        dataset_name: what the pairs were loaded from. Only a Hub id becomes metadata.
        tags: beside our own.
        language, license: metadata of the Hub.

    Returns:
        The file.
    """
    path = facts.args.folder / CARD_FILE
    card = _card_at(path)
    data: Any = card.data  # the kind with a model's fields, of the two that it may be
    data.library_name = data.library_name or ("peft" if isinstance(facts.model, PeftModel) else "transformers")
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    if is_hub_id(facts.base):
        data.base_model = facts.base
    if dataset_name and is_hub_id(dataset_name):
        data.datasets = sorted({*(data.datasets or ()), dataset_name})
    tags = [tags] if isinstance(tags, str) else list(tags or ())
    data.tags = sorted({*(data.tags or ()), *tags, *TAGS})
    data.language, data.license = language or data.language, license or data.license
    name = model_name or path.parent.resolve().name
    ours = redacted(f"{_BEGIN}\n{_section(facts, name, dataset_name)}\n{_END}")
    card.text = _merged(card.text, ours)
    with whole_or_not_at_all(path) as draft:
        card.save(draft)
    return path


def _card_at(path: Path) -> ModelCard:
    """What is there, or nothing; with a block of metadata, be it an empty one: ModelCard warns where it finds none."""
    text = path.read_bytes().decode("utf-8-sig") if path.exists() else ""
    return ModelCard(text if REGEX_YAML_BLOCK.search(text) else f"---\n{{}}\n---\n{text}")


def _merged(text: str, ours: str) -> str:
    if _BEGIN in text and _END in text:
        before, after = text.partition(_BEGIN)[0], text.rpartition(_END)[2]
        return f"{before}{ours}{after}"
    # A form that nobody filled in comes after what is known; what somebody wrote comes first.
    parts = [ours, text.strip()] if _BLANK in text else [text.strip(), ours]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_hub_id(name: str) -> bool:
    """Whether ``name`` could be a repository on the Hub, and is nothing on this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not os.path.exists(name) and Path(name).suffix not in FILE_FORMATS


def _section(facts: CardFacts, name: str, dataset_name: str | None) -> str:
    is_adapter = isinstance(facts.model, PeftModel)
    kind = "An adapter for" if is_adapter else "A fine-tuned version of"
    of = f"{kind} {_linked(facts.base, '')}" if facts.base else "A model"
    on = f" on {_linked(dataset_name, 'datasets/')}" if dataset_name else ""
    loss = " + ".join(facts.args.loss_type)
    settings = _settings(facts, loss)
    versions = {package: version(package) for package in ("fastdpo", "transformers", "torch", "datasets", "peft")}
    parts = [
        f"# {in_markdown(name)}",
        f"{of}, trained on preferences{on} with Direct Preference Optimisation "
        f"([DPO](https://arxiv.org/abs/2305.18290), loss `{loss}`, beta {facts.args.beta:g}) by fastdpo.",
        "## How to load it",
        _how_to_load_with_images(name, facts)
        if facts.takes_images
        else _how_to_load(name, is_adapter, facts.has_chat_template),
        "## Results",
        _results(facts.log_history),
        "## Training",
        _table(
            ("setting", "value"), [(f"{key}", _word(value)) for key, value in settings.items() if value is not None]
        ),
        "## Versions",
        _table(("package", "version"), list(versions.items())),
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(part for part in parts if part)


def _settings(facts: CardFacts, loss: str) -> dict[str, Any]:
    args = facts.args
    settings = {"loss": loss, "loss_weights": args.loss_weights, "beta": args.beta, **_loss_options(args.loss_options)}
    settings |= {"margin_alpha": args.margin_alpha}
    if args.sync_ref_model:
        settings |= {"sync_ref_model": f"alpha {args.mixup_alpha:g}, every {args.sync_steps} steps"}
    settings |= {setting: getattr(args, setting) for setting in _SETTINGS}
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * data_ranks(args, facts.model)
    kind = "groups of answers" if facts.are_groups else "pairs"
    settings |= {"epochs": facts.epochs, "optimiser steps": facts.steps, f"{kind} a step": rows}
    if facts.are_groups:
        settings |= {"pairs of a group": args.pairs, "weight_by_score": args.weight_by_score or None}
    dtype = str(facts.model.dtype).removeprefix("torch.")
    settings |= {"precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else dtype}
    return settings | _adapter_settings(facts.model) if isinstance(facts.model, PeftModel) else settings


def _linked(name: str, kind: str) -> str:
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return code_span(Path(name).name)  # where it lay on somebody's machine is nobody's business


def _loss_options(options: LossOptions) -> dict[str, Any]:
    """Those that are not at their default."""
    told = ("loss_type", "beta")
    return {
        f.name: getattr(options, f.name)
        for f in dataclasses.fields(options)
        if f.name not in told and f.default is not dataclasses.MISSING and getattr(options, f.name) != f.default
    }


def _adapter_settings(model: PeftModel) -> dict[str, Any]:
    config = model.active_peft_config
    names = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    settings = {f"adapter: {name}": getattr(config, name) for name in names if hasattr(config, name)}
    targets = settings.get("adapter: target_modules")
    if isinstance(targets, (set, list)):  # of every layer, by its full name
        settings["adapter: target_modules"] = sorted({name.rpartition(".")[2] for name in targets})
    return settings


def _how_to_load(name: str, is_adapter: bool, has_chat_template: bool) -> str:
    module, loader = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    lines = [
        f"from {module} import {loader}",
        "from transformers import AutoTokenizer",
        "",
        f"path = {json.dumps(visible_line(name), ensure_ascii=False)}  # this folder, or its name on the Hub",
        f"model = {loader}.from_pretrained(path)",
        "tokenizer = AutoTokenizer.from_pretrained(path)",
    ]
    if has_chat_template:
        lines += [
            'messages = [{"role": "user", "content": "Why is the sky blue?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("The sky is blue because", return_tensors="pt")')
    lines += [
        "output = model.generate(**inputs, max_new_tokens=128)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(["```python", *lines, "```"])


def _how_to_load_with_images(name: str, facts: CardFacts) -> str:
    path = json.dumps(visible_line(name), ensure_ascii=False)
    lines = ["from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
    if isinstance(facts.model, PeftModel):
        lines.insert(0, "from peft import PeftConfig, PeftModel")
        model = [
            "name = PeftConfig.from_pretrained(path).base_model_name_or_path  # what it was trained on",
            "base = AutoModelForImageTextToText.from_pretrained(name)",
            "model = PeftModel.from_pretrained(base, path)",
        ]
    else:
        model = ["model = AutoModelForImageTextToText.from_pretrained(path)"]
    lines += [
        f"path = {path}  # this folder, or its name on the Hub",
        *model,
        "processor = AutoProcessor.from_pretrained(path)",
    ]
    if facts.has_chat_template:
        lines += [
            'parts = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is in it?"}]',
            "inputs = processor.apply_chat_template(",
            '    [{"role": "user", "content": parts}],',
            '    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",',
            ")",
            "output = model.generate(**inputs, max_new_tokens=128)",
            'print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    return "\n".join(["```python", *lines, "```"])


def _results(log_history: Sequence[dict[str, Any]]) -> str:
    trained = [entry for entry in log_history if "loss" in entry]
    held_out = [entry for entry in log_history if "eval_loss" in entry]
    if not trained:
        return "Nothing was logged."
    rows = []
    for key, name in _RESULTS.items():
        ends = [(trained[0], key), (trained[-1], key)] + ([(held_out[-1], f"eval_{key}")] if held_out else [])
        rows.append((name, *(f"{entry[k]:.4g}" if k in entry else "" for entry, k in ends)))
    heads = ("", f"step {trained[0]['step']}", f"step {trained[-1]['step']}")
    return _table((*heads, "held out, at the end") if held_out else heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"([|\\])", r"\\\1", text)


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
