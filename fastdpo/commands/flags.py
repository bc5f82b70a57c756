"""The flags of ``fastdpo train``: those of ``trl dpo``, from the command line and from a YAML file."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, cast, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from fastdpo.commands.help_page import FlagHelp, HelpPage
from fastdpo.commands.launch_flags import LaunchFlags, profiles, takes
from fastdpo.errors import UsageError, bad_input
from fastdpo.report.snapshot import SnapshotSize
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.run_files import INSTEAD, advice

_NOT_SETTINGS = ("config", "help_all", "num_processes", "accelerate_config")
# Numbers whose default is one, and that may be None as well.
TAKES_NONE = ("max_length",)
_DEEP = 500  # brackets: half of what Python's reader of JSON takes

EPILOG = """\
examples:
  a model from the Hub, pairs from a file, metrics on a held-out tenth:
    fastdpo train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --output_dir my-model \\
        --dataset_train_split 'train[:90%]' --dataset_test_split 'train[90%:]' --eval_strategy steps --eval_steps 50

  the same with LoRA, and with the flags in a file (the command line wins over the file):
    fastdpo train --config run.yaml --use_peft --lora_r 32 --learning_rate 1e-5

  go on after a stop:
    fastdpo train ... --output_dir my-model --resume_from_checkpoint last

  several GPUs (torchrun and accelerate launch -m fastdpo train ... do as well):
    fastdpo train ... --num_processes 4 --accelerate_config fsdp2
"""

# What a first run needs from transformers.TrainingArguments; the rest is described by --help_all.
USUAL_TRAINING_FLAGS = (
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "use_cpu",
    "seed",
    "logging_steps",
    "logging_first_step",
    "report_to",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "push_to_hub",
)

# Where what we do with a flag is more than what transformers says of it.
HELP = {
    "logging_first_step": "Log the first step too, where policy and reference agree and the loss is known.",
    "output_dir": "Folder for the model, the checkpoints and the report of the run (default: trainer_output).",
    "resume_from_checkpoint": "'last' for the last checkpoint in output_dir, 'auto' for the same or, where there is "
    "none, the beginning; or the folder of a checkpoint.",
}


@dataclass
class ScriptArguments:
    """Which pairs."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Pairs: a Hub dataset, folders, or files (.jsonl, .json, .parquet, .arrow, .csv, .tsv; text also "
            "compressed: .gz, .bz2, .xz, .zst), one after another."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, where it has several."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split, or slice of one, to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split, or slice of one, to evaluate on when --eval_strategy is not 'no'."}
    )
    format: str | None = field(
        default=None,
        metadata={"help": "Format of the pairs, where it cannot be told: a name of docs/data.md, or FILE.py:FUNCTION."},
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of other names: prompt=question,chosen=good,rejected=bad."}
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={"help": "A mixture, as a list in --config: entries with path, name, data_files, split, fraction."},
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share, or number, of the pairs to hold out, and to evaluate on."}
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Read pairs as they are needed, for sets larger than memory. Needs --max_steps."},
    )
    streaming: bool = field(default=False, metadata={"help": "The same, as TRL's mixtures call it."})
    ignore_bias_buffers: bool = field(
        default=False, metadata={"help": "DDP: leave out buffers that are bool, such as masks, which some cannot send."}
    )
    dataset_shuffle_buffer: int = field(
        default=10_000,
        metadata={"help": "Streamed pairs come in random order from among so many; 0 for their own order."},
    )

    @property
    def names(self) -> list[str]:
        """What ``dataset_name`` names."""
        return [self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name or []

    @property
    def is_streamed(self) -> bool:
        return self.dataset_streaming or self.streaming

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, list) and len(self.dataset_name) == 1:  # the one, as in TRL
            (self.dataset_name,) = self.dataset_name  # type: ignore[assignment]  # a list is what the parser makes
        if self.dataset_shuffle_buffer < 0:
            raise ValueError(f"dataset_shuffle_buffer is {self.dataset_shuffle_buffer}; it should be at least 0")


@dataclass
class ModelArguments:
    """Which model, LoRA, and weights in 4 or 8 bits under it."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model to start from: a Hub id, or a folder written by save_pretrained. An adapter's is trained "
            "further, with what it was as the reference."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    dtype: str | None = field(
        default="float32",
        metadata={"help": "Type of the loaded weights.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention to use: sdpa, eager, flash_attention_2, ..."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter; the model itself stays as it is."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter; chosen by the model's type if not given."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters (rather than modules) that get an adapter, as in some MoE models."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole, beside the adapter."}
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "Task type in the adapter's configuration."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: magnitude and direction learnt apart."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "QLoRA: the model's weights in 4 bits, under an adapter. Needs bitsandbytes."},
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The model's weights in 8 bits, under an adapter."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Which numbers 4 bits stand for.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "4 bits: the scales of the weights in 8 bits as well."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata={
            "help": "4 bits: type of the tensors that hold them. By default uint8.",
            "choices": ["uint8", "float16", "bfloat16", "float32"],
        },
    )

    def __post_init__(self) -> None:
        for name in ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"):
            given = getattr(self, name)  # also with commas between names, which are no part of any
            if isinstance(given, list) and all(re.fullmatch(r"[\w.]+(,\s*[\w.]+)*,?", word) for word in given):
                setattr(self, name, [part.strip() for word in given for part in word.split(",") if part.strip()])
        # A pattern, or "all-linear", PEFT takes as a string only; and a string for a pattern, which a bare name as
        # one is not: it would have to be the whole of the module's name.
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            (target,) = self.lora_target_modules
            if not re.fullmatch(r"[\w.]+", target):
                self.lora_target_modules = target  # type: ignore[assignment]  # a list is what the parser makes
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both given; leave one of them out")


@dataclass
class ReportArguments:
    """What report.html shows of the policy, before and after training."""

    report_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Pairs whose implicit rewards are drawn; 0 for none. By default up to 64: as many as take little "
            "of the run's time, completions included at most a tenth (or 4 seconds)."
        },
    )
    report_samples: int | None = field(
        default=None,
        metadata={"help": "Prompts that are completed, greedily; 0 for none. By default up to 4, as time allows."},
    )
    report_max_new_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens of such a completion. By default up to 64, as time allows."}
    )

    def __post_init__(self) -> None:
        for name, least in (("report_pairs", 0), ("report_samples", 0), ("report_max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it should be at least {least}")

    def size(self) -> SnapshotSize:
        return SnapshotSize(self.report_pairs, self.report_samples, self.report_max_new_tokens)


# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------


class _Words(argparse.HelpFormatter):
    """One spelling of each flag, where argparse lists --a_b and --a-b; short choices; defaults that say something."""

    def describe(self, action: argparse.Action) -> FlagHelp:
        text = self._expand_help(action) if action.help else ""
        return FlagHelp(action.dest, self._format_action_invocation(action), text)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if action.default is True or (action.nargs == "?" and action.default is None):
            names.append(f"--no_{action.dest}")
        if action.nargs in (0, "?"):
            return ", ".join(names)
        kinds: dict[Any, str] = {int: "N", _number_or_none: "N", float: "X"}
        choices = list(action.choices or ())
        value = f"{{{','.join(map(str, choices))}}}" if 0 < len(choices) < 6 else kinds.get(action.type, "VALUE")
        return f"{', '.join(names)} {value}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        says_something = action.default not in (None, False, argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if says_something else "")


def _is_deep(value: Any) -> bool:
    return isinstance(value, str) and max(value.count("{"), value.count("[")) > _DEEP


def _bool_or_word(text: str) -> bool | str:
    try:
        value: bool = string_to_bool(text)
    except argparse.ArgumentTypeError:
        return text
    return value


def _number_or_none(text: str) -> int | None:
    return None if text.lower() in ("none", "null") else int(text)


_number_or_none.__name__ = "int"  # which argparse says of what is none


class TrainParser(HfArgumentParser):
    """The flags of the dataclasses, with grouped help, and errors that name the nearest flag.

    Attributes:
        asked: after :meth:`read`: name -> (value, default) of every flag, before anything is derived from it.
    """

    command = "train"
    launches = True  # processes that --num_processes and the like ask for
    summary = "train a model on preference pairs (DPO)."
    dataclasses: tuple[type, ...] = (ScriptArguments, ModelArguments, DPOConfig, ReportArguments)
    help_epilog = EPILOG
    others_title = "training, less usual (--help_all describes these)"

    def __init__(self) -> None:
        super().__init__(
            cast(Any, self.dataclasses),  # which are types, whatever transformers calls them
            prog=f"fastdpo {self.command}",
            allow_abbrev=False,  # an abbreviation would accept a misspelt flag as another one
        )
        self.add_argument("--config", help="YAML file of flags (without the dashes); the command line wins over it.")
        self.add_argument("--num_processes", type=int, help="Run in so many processes, one a device: DDP by default.")
        self.add_argument(
            "--accelerate_config",
            help=f"Run as accelerate launch does with this file of its own, or as one of {', '.join(profiles())}. Its "
            "other flags are taken as they are.",
        )
        self.add_argument("--help_all", action="store_true", help="Describe every flag, and exit.")
        for action in list(self._actions):
            self._mend(action)
        self._hints = {name: hint for kind in self.dataclasses for name, hint in get_type_hints(kind).items()}

    def _mend(self, action: argparse.Action) -> None:
        """What HfArgumentParser makes of a field, where it is not what a person would type or read."""
        if action.dest in HELP:
            action.help = HELP[action.dest]
        if action.dest == "include_num_input_tokens_seen":  # a word or a bool, of which it allows the bool alone
            action.type = _bool_or_word
        elif action.dest in TAKES_NONE:
            action.type = _number_or_none
        elif action.dest == "logging_first_step":  # where policy and reference agree: the loss that tells a sound start
            action.default = True
            self.add_argument("--no_logging_first_step", action="store_false", dest=action.dest, default=True)
        elif action.type is string_to_bool and action.default is None:
            # A bool that may be unset: --bf16 and --no_bf16 as for the others, beside --bf16 true.
            action.nargs, action.const = "?", True
            self.add_argument(f"--no_{action.dest}", action="store_false", dest=action.dest, default=None)

    def read(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The ``dataclasses`` filled from ``--config`` and the command line.

        Raises:
            UsageError: that is not possible.
            LaunchAskedError: they are to be read in other processes.
        """
        self._launch_flags = LaunchFlags()
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        first.add_argument("--help_all", action="store_true")
        early, _ = first.parse_known_args(argv)
        if early.help_all:
            print(self.help_page().render(everything=True))
            self.exit()
        namespace = self._read_yaml(Path(early.config)) if early.config else None
        namespace, unknown = self.parse_known_args(argv, namespace)
        if unknown := self._launch_flags.take(unknown):
            self._refuse(unknown)
        self._settle_launch(self._launch_flags, cast(argparse.Namespace, namespace))
        values = {name: value for name, value in vars(namespace).items() if name not in _NOT_SETTINGS}
        self.asked = {name: (value, self.get_default(name)) for name, value in values.items()}
        with bad_input():
            try:
                return self.parse_dict(values)
            except json.JSONDecodeError as error:  # of a flag that is JSON; it is not said which
                wrong = [f"--{name}" for name, value in values.items() if value == error.doc]
                raise ValueError(f"{', '.join(wrong) or 'a flag'}: no valid JSON ({error}): {error.doc}") from error
            except RecursionError as error:  # of a flag that is JSON; it is not said which
                deep = [f"--{name}" for name, value in values.items() if _is_deep(value)]
                raise ValueError(f"{', '.join(deep) or 'a flag'}: {error}") from error

    def _settle_launch(self, flags: LaunchFlags, asked: argparse.Namespace) -> None:
        """What the command makes of flags that are for ``accelerate launch``."""
        if self.launches:
            flags.require(asked)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n  (fastdpo {self.command} --help describes the flags.)")

    def format_help(self) -> str:
        return self.help_page().render(everything=False)

    def help_page(self) -> HelpPage:
        """What ``--help`` and ``--help_all`` say."""
        describe = _Words(self.prog).describe
        first = {action.dest: action for action in reversed(self._actions)}  # --x, and not --no_x, which comes later
        sections = [(title, [describe(first[name]) for name in names]) for title, names in self.groups().items()]
        shown = {flag.name for _, flags in sections for flag in flags}
        return HelpPage(
            heading=f"fastdpo {self.command}: {self.summary}",
            sections=sections,
            others_title=self.others_title,
            others=[describe(first[name]) for name in sorted(first.keys() - shown)],
            epilog=self.help_epilog,
        )

    def groups(self) -> dict[str, Sequence[str]]:
        """Titles, and the flags under each, that ``--help`` describes."""
        model = [f.name for f in fields(ModelArguments)]
        lora = [name for name in model if "lora" in name or name in ("use_peft", "use_dora")]
        quantized = [name for name in model if "bit" in name or "bnb" in name]
        inherited = {f.name for f in fields(TrainingArguments)}
        dpo = [f.name for f in fields(DPOConfig) if f.name not in inherited]
        return {
            "general": ["help", "help_all", "config", "num_processes", "accelerate_config"],
            "model": [name for name in model if name not in (*lora, *quantized)],
            "pairs": [f.name for f in fields(ScriptArguments)],
            "DPO": dpo,
            "LoRA": lora,
            "QLoRA": quantized,
            "training": USUAL_TRAINING_FLAGS,
            "report": [f.name for f in fields(ReportArguments)],
        }

    def _read_yaml(self, path: Path) -> argparse.Namespace:
        with bad_input(f"--config {path}"):
            text = path.read_text(encoding="utf-8")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise UsageError(f"--config {path}{line}: not valid YAML: {getattr(error, 'problem', error)}.") from error
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            # What PyYAML makes dates, numbers and marked values of raises errors of their own.
            raise UsageError(f"--config {path}: a value cannot be read ({error}).") from error
        if not isinstance(values, dict):
            raise UsageError(f"--config {path}: needed a mapping of flags to values, found {type(values).__name__}.")
        variables = values.pop("env", None) or {}
        if not isinstance(variables, dict):
            raise UsageError(f"--config {path}: env should be a mapping of names to values.")
        with bad_input(f"--config {path}, env"):
            os.environ.update({str(name): str(value) for name, value in variables.items()})
        if lines := advice(map(str, values.keys() - self._names())):
            raise UsageError("\n  ".join([f"--config {path}: of these keys", *lines]))
        namespace = self.parse_args([])
        for key, value in values.items():
            self._apply_yaml_value(path, str(key), value, namespace)
        return namespace

    def _apply_yaml_value(self, path: Path, key: str, value: Any, namespace: argparse.Namespace) -> None:
        if takes(key) and key not in self._names():
            if value is not None:
                self._launch_flags.add(key, value)
            return
        if key in ("config", "help", "help_all"):
            raise UsageError(f"--config {path}: {key} is for the command line; leave it out of the file.")
        if key not in self._names():
            raise UsageError(f"--config {path}: unknown key {key!r}.{self._nearest(key, '')}")
        if value is None and self._hints.get(key) in (int, float):
            raise UsageError(f"--config {path}: {key}: null is no value for it; leave it out, or give one.")
        # "No value", which the command line cannot say for every type, nor none of a list.
        if value is None or value == [] or (value == "" and self._takes_several(key)):
            setattr(namespace, key, value)
            return
        if value is False and self._takes_no(key):
            value = "no"  # which YAML reads as false
        try:
            words = _as_words(key, value)
        except (ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"--config {path}, {key}: a value that JSON has no form for ({error}).") from error
        try:
            # Through the same parser as the command line: the same types, choices and messages.
            self.parse_args(words, namespace)
        except UsageError as error:
            raise UsageError(f"--config {path}: {str(error).splitlines()[0]}") from error

    def _takes_several(self, name: str) -> bool:
        return any(action.nargs == "+" for action in self._actions if action.dest == name)

    def _takes_no(self, name: str) -> bool:
        return any("no" in (action.choices or ()) for action in self._actions if action.dest == name)

    def _names(self) -> set[str]:
        return {action.dest for action in self._actions}

    def _nearest(self, name: str, dashes: str) -> str:
        near = difflib.get_close_matches(name.replace("-", "_"), self._names(), n=1, cutoff=0.5)
        return f" Did you mean {dashes}{near[0]}?" if near else f" `fastdpo {self.command} --help` lists them."

    def _refuse(self, unknown: list[str]) -> None:
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if not flags:
            raise UsageError(f"unexpected {' '.join(unknown)!r}: every value needs its flag in front.")
        names = {flag: flag.lstrip("-").replace("-", "_") for flag in flags}
        if lines := [f"{flag}: {INSTEAD[name]}" for flag, name in names.items() if name in INSTEAD]:
            raise UsageError("\n  ".join(lines))
        raise UsageError(f"unknown flag {flags[0]}.{self._nearest(flags[0].lstrip('-'), '--')}")


def _as_words(key: str, value: Any) -> list[str]:
    """A YAML value as command-line words."""
    if isinstance(value, list):
        return [f"--{key}", *(_as_json(item) if isinstance(item, dict) else str(item) for item in value)]
    return [f"--{key}={_as_json(value) if isinstance(value, dict) else value}"]


def _as_json(values: dict[str, Any]) -> str:
    """With numbers such as 1e-7, which YAML's older version takes for words (a flag of its own is read by its type)."""
    numbers = {
        k: float(v) for k, v in values.items() if isinstance(v, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", v)
    }
    return json.dumps(values | numbers)
