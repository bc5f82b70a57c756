"""``fastdpo train``: checks before the run, the run, and what it leaves behind."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import ProgressCallback

from fastdpo.commands.flags import ModelArguments, ReportArguments, ScriptArguments, TrainParser
from fastdpo.commands.pairs import check_sources as check_pairs
from fastdpo.commands.pairs import label_of, load_pairs
from fastdpo.errors import INTERRUPTED, UsageError, bad_input
from fastdpo.model.adapters import load_tokenizer
from fastdpo.model.quantization import make_quantization_config
from fastdpo.report.facts import all_settings, changed_settings
from fastdpo.report.recorder import PICTURE_FILE, REPORT_FILE, RunReport, resume_command
from fastdpo.trainer.checkpoints import came_from, find_checkpoints, find_torn, is_end, resolve_resume, set_aside
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.gentle_stop import GentleStop
from fastdpo.trainer.model_card import CARD_FILE
from fastdpo.trainer.progress import OneLineProgress, format_metrics
from fastdpo.trainer.trainer import DPOTrainer

if TYPE_CHECKING:
    from peft import LoraConfig

console = Console(highlight=False, soft_wrap=True)


def run(argv: list[str]) -> int:
    """Run ``fastdpo train``.

    Args:
        argv: the words after ``fastdpo train``.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        UsageError: the flags, the data or the model cannot be used.
    """
    parser = TrainParser()
    arguments = parser.read(argv)
    script_args, model_args, training_args, report_args = arguments
    settings = all_settings(arguments)  # as they were asked for: making the trainer fills some in
    output_dir = Path(training_args.output_dir)
    check_sources(script_args, model_args)
    checkpoint = resolve_resume(training_args.resume_from_checkpoint, output_dir)
    if checkpoint is not None and _is_done(checkpoint, training_args):
        if training_args.process_index == 0:
            console.print(
                f"Nothing to do: this run ends at {checkpoint}, and what came of it is in {output_dir}. To train "
                "further, give more steps (--max_steps, --num_train_epochs)."
            )
        return 0
    trainer = make_trainer(script_args, model_args, training_args)
    if trainer.is_world_process_zero():
        _say_what_it_trains_on(trainer, output_dir)
        _say_where_it_starts(checkpoint, output_dir)
    report = _start_report(trainer, script_args, report_args, settings, parser, argv, checkpoint)

    stop = GentleStop()
    trainer.add_callback(stop)
    if trainer.pop_callback(ProgressCallback) is not None:  # --disable_tqdm has none
        trainer.add_callback(OneLineProgress)
    try:
        with stop.listening():
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        if report is not None:
            report.write(look=False)
        _say_how_to_resume(argv, output_dir)
        return INTERRUPTED
    if stop.stopped_at is not None and stop.stopped_at < trainer.state.max_steps:
        if report is not None:
            _say_how_to_resume(argv, output_dir)
            print(f"Writing {output_dir / REPORT_FILE}; Ctrl-C makes it short.", file=sys.stderr)
            report.write(result.metrics["train_runtime"])
        return INTERRUPTED
    _finish(trainer, result.metrics, script_args, report)
    return 0


def _is_done(checkpoint: Path, args: DPOConfig) -> bool:
    """Whether the run ends at the checkpoint, and its results were written, of which the report is the last."""
    output_dir = Path(args.output_dir)
    at_end = is_end(checkpoint, max_steps=args.max_steps, num_train_epochs=args.num_train_epochs)
    return at_end and came_from(output_dir, checkpoint) and (output_dir / REPORT_FILE).exists()


def _start_report(
    trainer: DPOTrainer,
    script_args: ScriptArguments,
    report_args: ReportArguments,
    settings: dict[str, Any],
    parser: TrainParser,
    argv: list[str],
    checkpoint: Path | None,
) -> RunReport | None:
    """The report, with the policy's start on record; None on all processes but the main one."""
    if not trainer.is_world_process_zero():
        return None
    size = report_args.size()
    if checkpoint is None and (size.pairs != 0 or size.samples != 0):
        console.print("For the report: a look at the policy, before and after (--report_pairs, --report_samples).")
    names = (settings["model_name_or_path"], label_of(script_args))
    return RunReport(
        trainer,
        size,
        title=" · ".join(Path(name).name for name in names),
        settings=settings,
        changed=changed_settings(parser.asked),
        argv=argv,
        checkpoint=checkpoint,
    )


def check_sources(script_args: ScriptArguments, model_args: ModelArguments) -> None:
    """Raises UsageError unless pairs and a model are named."""
    check_pairs(script_args)
    _require(model_args.model_name_or_path, "--model_name_or_path", "a Hub model, or a folder with one")
    _check_model_path(model_args.model_name_or_path)


def _require(value: str | None, flag: str, meaning: str) -> None:
    if not value:
        raise UsageError(f"{flag} is needed: {meaning}.")


def _check_model_path(name: str) -> None:
    # from_pretrained takes a misspelt path for a Hub id, and complains about that.
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UsageError(f"--model_name_or_path {name}: no such folder.")


def make_trainer(script_args: ScriptArguments, model_args: ModelArguments, training_args: DPOConfig) -> DPOTrainer:
    """The trainer that the flags describe, with its data read and its reference's log-probabilities at hand.

    Raises:
        UsageError: the flags, the data or the model cannot be used.
    """
    # The pairs first: they are read in a second, where a model may take minutes to load.
    evaluates = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_pairs(script_args, evaluates=evaluates, seed=training_args.seed)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": training_args.trust_remote_code,
        **_quantization_kwargs(model_args, training_args),
    } | (training_args.model_init_kwargs or {})
    with bad_input(f"--model_name_or_path {model_args.model_name_or_path}"):
        tokenizer = load_tokenizer(
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


def _quantization_kwargs(model_args: ModelArguments, training_args: DPOConfig) -> dict[str, Any]:
    """What ``from_pretrained`` takes for the flags of 4 and 8 bits."""
    if not model_args.load_in_4bit:
        defaults = ModelArguments()
        names = ("bnb_4bit_quant_type", "use_bnb_nested_quant")
        idle = [f"--{name}" for name in names if getattr(model_args, name) != getattr(defaults, name)]
        if idle:
            raise UsageError(f"{', '.join(idle)} would have no effect without --load_in_4bit.")
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return {}
    if "quantization_config" in (training_args.model_init_kwargs or {}):
        raise UsageError("--model_init_kwargs has a quantization_config, beside --load_in_4bit or --load_in_8bit.")
    # Products in the run's precision, where TRL has that of --dtype: float32, unless it is given.
    dtype = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else model_args.dtype
    with bad_input():
        config = make_quantization_config(
            4 if model_args.load_in_4bit else 8,
            compute_dtype=None if dtype in (None, "auto") else getattr(torch, dtype),
            quant_type=model_args.bnb_4bit_quant_type,
            nested=model_args.use_bnb_nested_quant,
        )
    return {"quantization_config": config}


def say_what_was_cached(trainer: DPOTrainer) -> None:
    """Print where the reference's log-probabilities are, and how many of them were there before."""
    for name, split in trainer.reference_splits.items():
        computed = split.rows - split.rows_read
        how = f"{split.rows_read} pairs read, {computed} computed" if computed else f"{split.rows_read} pairs read"
        console.print(f"Reference log-probabilities, {name}: {how}, {split.seconds:.1f} s: {split.folder}")


def _say_what_it_trains_on(trainer: DPOTrainer, output_dir: Path) -> None:
    summaries = trainer.data_summaries
    for name, summary in summaries.items():
        console.print(f"\n[bold]{name}[/]", summary.table(), sep="\n")
    say_what_was_cached(trainer)
    if not trainer.packing.reasons:  # a layout that something stood in the way of was announced with the reason
        console.print(f"Batches are laid out in {trainer.packing}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: summary.as_dict() for name, summary in summaries.items()}, indent=2)
    (output_dir / "data_summary.json").write_text(text + "\n", encoding="utf-8")


def _say_where_it_starts(checkpoint: Path | None, output_dir: Path) -> None:
    folder = set_aside(output_dir, checkpoint)
    if checkpoint is not None:
        console.print(f"Going on from {checkpoint}.")
        if folder is not None:
            torn = [path.name for path in find_torn(folder)]
            which = f" ({', '.join(torn)} had not been written to the end)" if torn else ""
            console.print(f"The other checkpoints that this run comes to were moved to {folder}{which}.")
        return
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
    report: RunReport | None,
) -> None:
    """Save everything, and say where it is."""
    output_dir = Path(trainer.args.output_dir)
    trainer.save_model(str(output_dir))
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.create_model_card(dataset_name=label_of(script_args))
    if report is not None:
        report.write(metrics["train_runtime"])
        what = "adapter and tokenizer" if isinstance(trainer.model, PeftModel) else "model and tokenizer"
        last = [entry for entry in trainer.state.log_history if "loss" in entry][-1:]
        console.print(f"\n[bold]Done: {trainer.state.global_step} steps.[/]  {''.join(map(format_metrics, last))}")
        for label, path in (
            (what, output_dir),
            ("report, for a browser", output_dir / REPORT_FILE),
            ("picture of the run", output_dir / PICTURE_FILE),
            ("metrics, step by step", output_dir / "trainer_state.json"),
            ("totals and speed", output_dir / "train_results.json"),
            ("model card", output_dir / CARD_FILE),
            ("what became of the rows", output_dir / "data_summary.json"),
        ):
            console.print(f"  {label:<27} {path}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=label_of(script_args))


def _say_how_to_resume(argv: list[str], output_dir: Path) -> None:
    there = find_checkpoints(output_dir)
    if not there:
        print("Stopped. No checkpoint had been written, so there is nothing to resume from.", file=sys.stderr)
        return
    print(f"Stopped. The last checkpoint is {there[-1]}. To go on:\n  {resume_command(argv)}", file=sys.stderr)
