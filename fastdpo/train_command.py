"""``fastdpo train``: flags, checks before the run, the run, and what it leaves behind."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.console import Console
from transformers import AutoTokenizer, HfArgumentParser, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastdpo.cli import INTERRUPTED, UsageError
from fastdpo.data import DataError, load_preferences
from fastdpo.report import draw_training
from fastdpo.trainer import DPOConfig, DPOTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig

EPILOG = """\
examples:
  a model from the Hub, pairs from a file, metrics on a held-out tenth:
    fastdpo train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --output_dir my-model \\
        --dataset_train_split 'train[:90%]' --dataset_test_split 'train[90%:]' --eval_strategy steps --eval_steps 50

  the same with LoRA, and with the flags in a file (the command line wins over the file):
    fastdpo train --config run.yaml --use_peft --lora_r 32 --learning_rate 1e-5

  go on after a stop:
    fastdpo train ... --output_dir my-model --resume_from_checkpoint last

  several GPUs:
    accelerate launch -m fastdpo train ...
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
    "output_dir": "Folder for the model, the checkpoints and the picture of the run (default: trainer_output).",
    "resume_from_checkpoint": "'last' for the last checkpoint in output_dir, or the folder of a checkpoint.",
}

console = Console(highlight=False, soft_wrap=True)


@contextmanager
def bad_input(what: str = "") -> Iterator[None]:
    """Turn the errors that libraries raise about their input into UsageError, with ``what`` in front."""
    try:
        yield
    except DataError as error:  # says all there is to say
        raise UsageError(str(error)) from error
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        prefix = f"{what}: " if what else ""
        raise UsageError(f"{prefix}{lines[0]}\n  (FASTDPO_TRACEBACK=1 shows where this came from.)") from error


@dataclass
class ScriptArguments:
    """Which pairs."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Pairs: a Hub dataset, a folder, or a .jsonl, .json, .parquet or .csv file."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, where it has several."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split, or slice of one, to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split, or slice of one, to evaluate on when --eval_strategy is not 'no'."}
    )


@dataclass
class ModelArguments:
    """Which model, and LoRA."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to start from: a Hub id, or a folder written by save_pretrained."}
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

    def __post_init__(self) -> None:
        # One value may be a pattern or "all-linear", which PEFT takes as a string only.
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            self.lora_target_modules = self.lora_target_modules[0]


# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------


class _HelpFormatter(argparse.HelpFormatter):
    """One spelling of each flag, where argparse lists --a_b and --a-b; short choices; defaults that say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 110))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if action.default is True or (action.nargs == "?" and action.default is None):
            names.append(f"--no_{action.dest}")
        if action.nargs in (0, "?"):
            return ", ".join(names)
        kinds = {int: "N", float: "X"}
        short = action.choices and len(action.choices) < 6
        value = f"{{{','.join(map(str, action.choices))}}}" if short else kinds.get(action.type, "VALUE")
        return f"{', '.join(names)} {value}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        says_something = action.default not in (None, False, argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if says_something else "")


def _bool_or_word(text: str) -> bool | str:
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        return text


class TrainParser(HfArgumentParser):
    """The flags of the three dataclasses, with grouped help, and errors that name the nearest flag."""

    def __init__(self) -> None:
        super().__init__(
            (ScriptArguments, ModelArguments, DPOConfig),
            prog="fastdpo train",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,  # an abbreviation would accept a misspelt flag as another one
        )
        self.add_argument("--config", help="YAML file of flags (without the dashes); the command line wins over it.")
        self.add_argument("--help_all", action="store_true", help="Describe every flag, and exit.")
        for action in list(self._actions):
            self._mend(action)

    def _mend(self, action: argparse.Action) -> None:
        """What HfArgumentParser makes of a field, where it is not what a person would type or read."""
        if action.dest in HELP:
            action.help = HELP[action.dest]
        if action.dest == "include_num_input_tokens_seen":  # a word or a bool, of which it allows the bool alone
            action.type = _bool_or_word
        elif action.dest == "logging_first_step":  # where policy and reference agree: the loss that tells a sound start
            action.default = True
            self.add_argument("--no_logging_first_step", action="store_false", dest=action.dest, default=True)
        elif action.type is string_to_bool and action.default is None:
            # A bool that may be unset: --bf16 and --no_bf16 as for the others, beside --bf16 true.
            action.nargs, action.const = "?", True
            self.add_argument(f"--no_{action.dest}", action="store_false", dest=action.dest, default=None)

    def read(self, argv: Sequence[str]) -> tuple[ScriptArguments, ModelArguments, DPOConfig]:
        """The dataclasses filled from ``--config`` and the command line; UsageError if that is not possible."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        first.add_argument("--help_all", action="store_true")
        early, _ = first.parse_known_args(argv)
        if early.help_all:
            print(self._format_help(everything=True))
            self.exit()
        namespace = self._read_yaml(Path(early.config)) if early.config else None
        namespace, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            self._refuse(unknown)
        values = {name: value for name, value in vars(namespace).items() if name not in ("config", "help_all")}
        with bad_input():
            return self.parse_dict(values)

    def error(self, message: str) -> None:
        raise UsageError(f"{message}\n  (fastdpo train --help describes the flags.)")

    def format_help(self) -> str:
        return self._format_help(everything=False)

    def _format_help(self, everything: bool) -> str:
        formatter = self._get_formatter()
        formatter.add_text("fastdpo train: train a model on preference pairs (DPO).")
        groups = self._groups()
        shown = {action.dest for _, actions in groups for action in actions}
        others = {action.dest: action for action in reversed(self._actions) if action.dest not in shown}
        if everything:
            groups.append(("training, less usual", [others[name] for name in sorted(others)]))
        for title, actions in groups:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        if not everything:
            formatter.start_section("training, less usual (--help_all describes these)")
            formatter.add_text(", ".join(f"--{name}" for name in sorted(others)))
            formatter.end_section()
        return f"{formatter.format_help()}\n{EPILOG}"

    def _groups(self) -> list[tuple[str, list[argparse.Action]]]:
        model = [f.name for f in fields(ModelArguments)]
        lora = [name for name in model if "lora" in name or name in ("use_peft", "use_dora")]
        inherited = {f.name for f in fields(TrainingArguments)}
        dpo = [f.name for f in fields(DPOConfig) if f.name not in inherited]
        groups = {
            "general": ["help", "help_all", "config"],
            "model": [name for name in model if name not in lora],
            "pairs": [f.name for f in fields(ScriptArguments)],
            "DPO": dpo,
            "LoRA": lora,
            "training": USUAL_TRAINING_FLAGS,
        }
        first = {action.dest: action for action in reversed(self._actions)}  # --x, and not --no_x, which comes later
        return [(title, [first[name] for name in names]) for title, names in groups.items()]

    def _read_yaml(self, path: Path) -> argparse.Namespace:
        with bad_input(f"--config {path}"):
            text = path.read_text(encoding="utf-8")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise UsageError(f"--config {path}{line}: not valid YAML: {getattr(error, 'problem', error)}.") from error
        if not isinstance(values, dict):
            raise UsageError(f"--config {path}: needed a mapping of flags to values, found {type(values).__name__}.")
        os.environ.update({name: str(value) for name, value in (values.pop("env", None) or {}).items()})
        namespace = self.parse_args([])
        for key, value in values.items():
            self._apply_yaml_value(path, str(key), value, namespace)
        return namespace

    def _apply_yaml_value(self, path: Path, key: str, value: Any, namespace: argparse.Namespace) -> None:
        if key not in self._names() or key in ("config", "help", "help_all"):
            raise UsageError(f"--config {path}: unknown key {key!r}.{self._nearest(key, '')}")
        if value is None:  # "no value", which the command line cannot say for every type
            setattr(namespace, key, None)
            return
        try:
            # Through the same parser as the command line: the same types, choices and messages.
            self.parse_args(_as_words(key, value), namespace)
        except UsageError as error:
            raise UsageError(f"--config {path}: {str(error).splitlines()[0]}") from error

    def _names(self) -> set[str]:
        return {action.dest for action in self._actions}

    def _nearest(self, name: str, dashes: str) -> str:
        near = difflib.get_close_matches(name.replace("-", "_"), self._names(), n=1, cutoff=0.5)
        return f" Did you mean {dashes}{near[0]}?" if near else " `fastdpo train --help` lists them."

    def _refuse(self, unknown: list[str]) -> None:
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if not flags:
            raise UsageError(f"unexpected {' '.join(unknown)!r}: every value needs its flag in front.")
        raise UsageError(f"unknown flag {flags[0]}.{self._nearest(flags[0].lstrip('-'), '--')}")


def _as_words(key: str, value: Any) -> list[str]:
    """A YAML value as command-line words."""
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written to their end, in the order of their steps."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step_of(path) is not None]
    return sorted(filter(_is_whole, found), key=_step_of)


def _step_of(path: Path) -> int | None:
    step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(step) if step.isdigit() and path.is_dir() else None


def _is_whole(checkpoint: Path) -> bool:
    """trainer_state.json is what a checkpoint's writing ends with; a killed run may have left one without it."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def resolve_resume(value: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means; None where it was not given or is false.

    Raises:
        UsageError: there is no such checkpoint.
    """
    if value is None or value.lower() in ("false", "no", "0"):
        return None
    there = find_checkpoints(output_dir)
    if value.lower() in ("true", "last", "yes", "1"):
        if there:
            return there[-1]
        raise UsageError(
            f"--resume_from_checkpoint {value}: no whole checkpoint in {output_dir}. Leave the flag out to start from "
            "the beginning, or name the checkpoint's folder."
        )
    checkpoint = Path(value)
    if not _is_whole(checkpoint):
        known = f" In {output_dir}: {', '.join(path.name for path in there)}." if there else ""
        raise UsageError(f"--resume_from_checkpoint {value}: not a checkpoint (no trainer_state.json there).{known}")
    return checkpoint


def set_aside(output_dir: Path) -> Path | None:
    """Move the checkpoints of an earlier run into a folder beside them, and return it; None if there are none.

    Left where they are, they would be overwritten step by step, and "the last checkpoint" would be a mixture of two
    runs.
    """
    old = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step_of(path) is not None]
    if not old:
        return None
    number = 1
    while (folder := output_dir / f"previous-{number}").exists():
        number += 1
    folder.mkdir()
    for path in old:
        path.rename(folder / path.name)
    return folder


class OneLineProgress(ProgressCallback):
    """The progress bar, with one short line per log instead of a dict of everything."""

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        line = format_metrics(logs or {})  # nothing of this is in the totals that end a run
        if line and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(f"step {state.global_step:>5}  {line}")


def format_metrics(logs: dict[str, Any]) -> str:
    """The metrics that a person follows, from one entry of a log."""
    shown = {
        "loss": "loss",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
        "rewards/chosen": "chosen",
        "rewards/rejected": "rejected",
        "grad_norm": "grad",
        "learning_rate": "lr",
    }
    prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
    words = [f"{text} {float(logs[prefix + key]):.4g}" for key, text in shown.items() if prefix + key in logs]
    return "  ".join(["eval", *words] if prefix else words)


class GentleStop(TrainerCallback):
    """The first Ctrl-C lets the step end and saves a checkpoint; the second stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped_at: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C over for the duration of the run."""
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self._anyone_asked(args):
            control.should_log = control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def _anyone_asked(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self.asked
        # Processes hear of the signal at different moments; all must leave after the same step.
        asked = torch.tensor(float(self.asked), device=args.device)
        torch.distributed.all_reduce(asked)
        return bool(asked.item())


# --------------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------------


def run(argv: list[str]) -> int:
    """Run ``fastdpo train``.

    Args:
        argv: the words after ``fastdpo train``.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        UsageError: the flags, the data or the model cannot be used.
    """
    try:
        script_args, model_args, training_args = TrainParser().read(argv)
    except SystemExit as exit_:  # --help
        return int(exit_.code or 0)
    output_dir = Path(training_args.output_dir)
    _require(script_args.dataset_name, "--dataset_name", "a Hub dataset, a folder, or a .jsonl file of pairs")
    _require(model_args.model_name_or_path, "--model_name_or_path", "a Hub model, or a folder with one")
    _check_model_path(model_args.model_name_or_path)
    checkpoint = resolve_resume(training_args.resume_from_checkpoint, output_dir)
    trainer = _make_trainer(script_args, model_args, training_args)
    if trainer.is_world_process_zero():
        _say_what_it_trains_on(trainer, output_dir)
        _say_where_it_starts(checkpoint, output_dir)

    stop = GentleStop()
    trainer.add_callback(stop)
    if trainer.pop_callback(ProgressCallback) is not None:  # --disable_tqdm has none
        trainer.add_callback(OneLineProgress)
    try:
        with stop.listening():
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        _say_how_to_resume(argv, output_dir)
        return INTERRUPTED
    if stop.stopped_at is not None and stop.stopped_at < trainer.state.max_steps:
        if trainer.is_world_process_zero():
            _draw(trainer, script_args, model_args, output_dir)
            _say_how_to_resume(argv, output_dir)
        return INTERRUPTED
    _finish(trainer, result.metrics, script_args, model_args, output_dir)
    return 0


def _require(value: str | None, flag: str, meaning: str) -> None:
    if not value:
        raise UsageError(f"{flag} is needed: {meaning}.")


def _check_model_path(name: str) -> None:
    # from_pretrained takes a misspelt path for a Hub id, and complains about that.
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"--model_name_or_path {name}: no such folder.")


def _make_trainer(script_args: ScriptArguments, model_args: ModelArguments, training_args: DPOConfig) -> DPOTrainer:
    # The pairs first: they are read in a second, where a model may take minutes to load.
    train_dataset = _load_pairs(script_args, script_args.dataset_train_split)
    evaluates = training_args.eval_strategy != "no"
    eval_dataset = _load_pairs(script_args, script_args.dataset_test_split) if evaluates else None
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": training_args.trust_remote_code,
    } | (training_args.model_init_kwargs or {})
    with bad_input(f"--model_name_or_path {model_args.model_name_or_path}"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
    with bad_input():
        return DPOTrainer(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=make_peft_config(model_args),
        )


def _load_pairs(script_args: ScriptArguments, split: str) -> Dataset:
    with bad_input():
        return load_preferences(script_args.dataset_name, split=split, config_name=script_args.dataset_config)


def make_peft_config(model_args: ModelArguments) -> LoraConfig | None:
    """The LoRA configuration that the flags describe; None without ``--use_peft``.

    Raises:
        UsageError: a flag of the adapter was given without ``--use_peft``, and would have no effect.
    """
    if not model_args.use_peft:
        defaults = ModelArguments()
        idle = [
            f"--{f.name}"
            for f in fields(ModelArguments)
            if ("lora" in f.name or f.name == "use_dora") and getattr(model_args, f.name) != getattr(defaults, f.name)
        ]
        if idle:
            raise UsageError(f"{', '.join(idle)} would have no effect without --use_peft.")
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )


def _say_what_it_trains_on(trainer: DPOTrainer, output_dir: Path) -> None:
    summaries = trainer.data_summaries
    for name, summary in summaries.items():
        console.print(f"\n[bold]{name}[/]", summary.table(), sep="\n")
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: summary.as_dict() for name, summary in summaries.items()}, indent=2)
    (output_dir / "data_summary.json").write_text(text + "\n", encoding="utf-8")


def _say_where_it_starts(checkpoint: Path | None, output_dir: Path) -> None:
    if checkpoint is not None:
        console.print(f"Going on from {checkpoint}.")
        return
    folder = set_aside(output_dir)
    if folder is None:
        return
    last = find_checkpoints(folder)[-1:]
    how = f" To go on from them instead: --resume_from_checkpoint {last[0]}" if last else ""
    console.print(
        f"[bold yellow]{output_dir} holds checkpoints of an earlier run, and --resume_from_checkpoint was not given.[/]"
        f"\nThey were moved to {folder}; this run starts from step 0, and replaces the model in {output_dir} when it "
        f"ends.{how}"
    )


def _finish(
    trainer: DPOTrainer,
    metrics: dict[str, float],
    script_args: ScriptArguments,
    model_args: ModelArguments,
    output_dir: Path,
) -> None:
    """Save everything, and say where it is."""
    trainer.save_model(str(output_dir))
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        _draw(trainer, script_args, model_args, output_dir)
        what = "LoRA adapter and tokenizer" if model_args.use_peft else "model and tokenizer"
        last = [entry for entry in trainer.state.log_history if "loss" in entry][-1:]
        console.print(f"\n[bold]Done: {trainer.state.global_step} steps.[/]  {''.join(map(format_metrics, last))}")
        for label, path in (
            (what, output_dir),
            ("picture of the run", output_dir / "training.png"),
            ("metrics, step by step", output_dir / "trainer_state.json"),
            ("totals and speed", output_dir / "train_results.json"),
            ("what became of the rows", output_dir / "data_summary.json"),
        ):
            console.print(f"  {label:<27} {path}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def _draw(trainer: DPOTrainer, script_args: ScriptArguments, model_args: ModelArguments, output_dir: Path) -> None:
    names = (model_args.model_name_or_path, script_args.dataset_name)
    title = " · ".join(Path(name).name for name in names)
    draw_training(trainer.state.log_history, output_dir / "training.png", title=title)


def _say_how_to_resume(argv: list[str], output_dir: Path) -> None:
    there = find_checkpoints(output_dir)
    if not there:
        print("Stopped. No checkpoint had been written, so there is nothing to resume from.", file=sys.stderr)
        return
    command = shlex.join(["fastdpo", "train", *_without_resume(argv), "--resume_from_checkpoint", "last"])
    print(f"Stopped. The last checkpoint is {there[-1]}. To go on:\n  {command}", file=sys.stderr)


def _without_resume(argv: list[str]) -> list[str]:
    words, skip = [], False
    for word in argv:
        name = word.split("=")[0].replace("-", "_").strip("_")
        if name == "resume_from_checkpoint" and word.startswith("--"):
            skip = "=" not in word
        elif skip:
            skip = False
        else:
            words.append(word)
    return words
