"""The flags of ``fastdpo train``: those of ``trl dpo``, from the command line and from a YAML file."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, cast, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from fastdpo.commands.arguments import ModelArguments, ReportArguments, ScriptArguments
from fastdpo.commands.config_file import ConfigFile
from fastdpo.commands.flag_words import Words, bool_or_word, json_mapping, number_or_none
from fastdpo.commands.help_page import HelpPage
from fastdpo.commands.launch_flags import LaunchFlags, profiles
from fastdpo.errors import UsageError, bad_input
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.run_files import INSTEAD

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


def _is_deep(value: Any) -> bool:
    return isinstance(value, str) and max(value.count("{"), value.count("[")) > _DEEP


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
            action.type = bool_or_word
        elif get_origin(action.type) is dict:  # what is made of a word by calling it is none
            action.type = json_mapping
        elif action.dest in TAKES_NONE:
            action.type = number_or_none
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
        namespace = self._config_file(Path(early.config)).read() if early.config else None
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
        describe = Words(self.prog).describe
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

    def _config_file(self, path: Path) -> ConfigFile:
        return ConfigFile(path, self, self._hints, self._launch_flags, lambda name: self._nearest(name, ""))

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
