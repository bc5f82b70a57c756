"""``fastdpo cache-ref``: the reference's log-probabilities of a dataset, computed once, for the trainings to come."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from fastdpo.commands.arguments import ModelArguments, ScriptArguments
from fastdpo.commands.flags import TrainParser
from fastdpo.commands.preparation import (
    bad_writes,
    check_names,
    console,
    say,
    say_what_was_prepared,
    telling_how_to_go_on,
)
from fastdpo.commands.trainer_from_flags import check_sources, make_trainer
from fastdpo.errors import INTERRUPTED, Stopped, bad_input
from fastdpo.ref_cache.files import DEFAULT_FOLDER, MANIFEST, RefCache
from fastdpo.report.facts import command_line
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.gentle_stop import stopping_on_signals

EPILOG = """\
Training by --precompute_ref_log_probs, or with --ref_cache, reads what is found here and computes what is not, so this
command is for computing it beforehand: elsewhere, on more devices, or once for many trainings.

The cache is bound to the reference's weights and configuration, its precision, the tokenizer and the chat template,
every row's token ids, and --max_length and --truncation_mode. Training refuses one that belongs to anything else, and
says what differs. manifest.json in each folder says what was computed. A build that was stopped or killed goes on
where it was when the command is given again.

examples:
  compute, then train; the same flags for both:
    fastdpo cache-ref --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --ref_cache my-ref
    fastdpo train     --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --ref_cache my-ref \\
        --output_dir my-model --learning_rate 1e-6

  with the training's file of flags, on all GPUs of a machine:
    accelerate launch -m fastdpo cache-ref --config run.yaml
"""


@dataclass
class CacheArguments:
    """What to do with a cache that is there."""

    rebuild: bool = field(
        default=False, metadata={"help": "Delete what is cached in the folder, of whatever it is, and compute it anew."}
    )


class CacheRefParser(TrainParser):
    """The flags of ``fastdpo train``, so that its command line and its files serve as they are."""

    command = "cache-ref"
    summary = "compute the reference's log-probabilities of preference pairs once, and keep them on disk."
    dataclasses = (ScriptArguments, ModelArguments, *TrainParser.dataclasses[2:], CacheArguments)
    help_epilog = EPILOG
    others_title = "flags of `fastdpo train` that are accepted, and change nothing here (--help_all describes them)"

    def __init__(self) -> None:
        super().__init__()
        self.set_defaults(precompute_ref_log_probs=True)

    def groups(self) -> dict[str, Sequence[str]]:
        model = [f.name for f in fields(ModelArguments) if "lora" not in f.name and "dora" not in f.name]
        return {
            "general": ["help", "help_all", "config", "num_processes", "accelerate_config"],
            "model": [*(name for name in model if name != "use_peft"), "model_init_kwargs", "trust_remote_code"],
            "pairs": [
                *(f.name for f in fields(ScriptArguments)),
                "eval_strategy",
                "max_length",
                "truncation_mode",
                "strict",
                "dataset_num_proc",
            ],
            "cache": ["ref_cache", "output_dir", "rebuild"],
            "computing": [
                "precompute_ref_batch_size",
                "per_device_train_batch_size",
                "per_device_eval_batch_size",
                "bf16",
                "fp16",
                "use_cpu",
                "disable_tqdm",
            ],
        }


def run(argv: list[str]) -> int:
    """Run ``fastdpo cache-ref``.

    Args:
        argv: the words after ``fastdpo cache-ref``.

    Returns:
        0, 130 after Ctrl-C, 143 after SIGTERM or SIGUSR1, or 129 after SIGHUP.

    Raises:
        UsageError: the flags, the data, the model or the cache that is there cannot be used.
        LostRankError: another process of the run is gone.
    """
    script_args, model_args, training_args, *_, cache_args = CacheRefParser().read(argv)
    check_sources(script_args, model_args)
    check_names(output_dir=training_args.output_dir, ref_cache=training_args.ref_cache)
    with stopping_on_signals(), bad_writes(training_args.folder):
        return _build(argv, script_args, model_args, training_args, cache_args)


def _build(
    argv: list[str],
    script_args: ScriptArguments,
    model_args: ModelArguments,
    training_args: DPOConfig,
    cache_args: CacheArguments,
) -> int:
    training_args.precompute_ref_log_probs = True
    folder = Path(training_args.ref_cache or training_args.folder / DEFAULT_FOLDER)
    if cache_args.rebuild:
        with training_args.main_process_first(desc="deleting the old cache"), bad_input():
            if training_args.process_index == 0:
                _delete_caches(folder)
    command = command_line([word for word in argv if word != "--rebuild"], "cache-ref")
    try:
        with telling_how_to_go_on(lambda: f"What was computed is kept in {folder}", lambda: command):
            trainer = make_trainer(script_args, model_args, training_args)
    except KeyboardInterrupt as error:
        say(f"\nStopped. What was computed is kept in {folder}. To go on:\n  {command}")
        return error.exit_code if isinstance(error, Stopped) else INTERRUPTED
    if trainer.is_world_process_zero():
        say_what_was_prepared(trainer)
        console.print(f"To train with them: fastdpo train … --ref_cache {shlex.quote(str(folder))}")
    return 0


def _delete_caches(folder: Path) -> None:
    for manifest in [*folder.glob(f"train/{MANIFEST}"), *folder.glob(f"eval*/{MANIFEST}")]:
        cache = RefCache(manifest.parent)
        with cache.lock():
            cache.discard()
