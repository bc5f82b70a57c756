"""``fastdpo train``: checks before the run, the run, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.text import Text
from transformers import ProgressCallback

from fastdpo.commands.arguments import ReportArguments, ScriptArguments
from fastdpo.commands.flags import TrainParser
from fastdpo.commands.pairs import label_of
from fastdpo.commands.preparation import (
    bad_writes,
    check_names,
    console,
    say,
    say_what_was_prepared,
    telling_how_to_go_on,
)
from fastdpo.commands.trainer_from_flags import check_sources, make_trainer
from fastdpo.errors import DIVERGED, INTERRUPTED, DivergedError, InputError, UsageError, bad_input
from fastdpo.logps.cpu_memory import use_tensor_memory
from fastdpo.report.facts import all_settings, changed_settings, command_line
from fastdpo.report.recorder import PICTURE_FILE, REPORT_FILE, RunReport, resume_command
from fastdpo.trainer.checkpoints import (
    came_from,
    find_checkpoints,
    find_torn,
    is_end,
    remove_torn,
    resolve_resume,
    set_aside,
)
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.gentle_stop import GentleStop, stopping_on_signals
from fastdpo.trainer.hub import UploadError, is_pushed, is_run_record, note_push
from fastdpo.trainer.lost_ranks import kept_in
from fastdpo.trainer.manifest import damage_in, read_manifest, write_manifest
from fastdpo.trainer.model_card import CARD_FILE
from fastdpo.trainer.progress import OneLineProgress, format_end
from fastdpo.trainer.resume_settings import settings_of
from fastdpo.trainer.run_lock import only_run_in
from fastdpo.trainer.trainer import DPOTrainer
from fastdpo.trainer.without_effect import without_effect


def run(argv: list[str]) -> int:
    """Run ``fastdpo train``.

    Args:
        argv: the words after ``fastdpo train``.

    Returns:
        0, 1 after the run came to numbers that are none, 130 after Ctrl-C, 143 after SIGTERM or SIGUSR1, or 129 after
        SIGHUP.

    Raises:
        UsageError: the flags, the data or the model cannot be used; another run is in the folder; the disk is full.
        Stopped: SIGTERM, SIGUSR1 or SIGHUP came where there was nothing to save.
        LostRankError: another process of the run is gone.
    """
    parser = TrainParser()
    arguments = parser.read(argv)
    script_args, model_args, training_args, _ = arguments
    check_sources(script_args, model_args)
    check_names(
        output_dir=training_args.output_dir,
        ref_cache=training_args.ref_cache,
        resume_from_checkpoint=training_args.resume_from_checkpoint,
    )

    def command() -> str:
        return resume_command(argv) if find_checkpoints(training_args.folder) else command_line(argv)

    with (
        stopping_on_signals(),
        bad_writes(training_args.folder),
        telling_how_to_go_on(lambda: kept_in(training_args.folder), command),
        _alone(training_args),
    ):
        return _run(argv, parser, arguments)


@contextmanager
def _alone(args: DPOConfig) -> Iterator[None]:
    with ExitStack() as stack:
        with bad_input():
            stack.enter_context(only_run_in(args.folder, is_main=args.process_index == 0))
        yield


def _run(argv: list[str], parser: TrainParser, arguments: tuple[Any, ...]) -> int:
    script_args, model_args, training_args, report_args = arguments
    _say_what_does_nothing(parser, arguments)
    settings = all_settings(arguments)  # as they were asked for: making the trainer fills some in
    output_dir = training_args.folder
    checkpoint = resolve_resume(training_args.resume_from_checkpoint, output_dir)
    if checkpoint is not None and _is_done(checkpoint, training_args):
        if training_args.process_index == 0:
            console.print(
                f"Nothing to do: this run ends at {checkpoint}, and what came of it is in {output_dir}. To train "
                "further, give more steps (--max_steps, --num_train_epochs)."
            )
        return 0
    _take_over(checkpoint, training_args, parser)
    if training_args.device.type == "cpu":
        use_tensor_memory()
    trainer = make_trainer(script_args, model_args, training_args)
    if trainer.is_world_process_zero():
        _say_what_it_trains_on(trainer, output_dir)
        goes_on = checkpoint is not None or (training_args.resume_from_checkpoint or "").lower() == "auto"
        _say_where_it_starts(checkpoint, output_dir, goes_on=goes_on)
    report = _start_report(trainer, script_args, report_args, settings, parser, argv, checkpoint)

    stop = GentleStop()
    trainer.add_callback(stop)
    if trainer.pop_callback(ProgressCallback) is not None:  # --disable_tqdm has none
        trainer.add_callback(OneLineProgress)
    try:
        with stop.listening():
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except InputError as error:
        raise UsageError(str(error)) from error
    except DivergedError as error:
        return _diverged(error, report, argv, output_dir)
    except KeyboardInterrupt:
        if report is not None:
            report.write(look=False)
        _say_how_to_resume(argv, output_dir)
        return INTERRUPTED
    if stop.stopped_at is not None and stop.stopped_at < trainer.state.max_steps:
        if report is not None:
            _say_how_to_resume(argv, output_dir)
            # Who sends SIGTERM waits a short while, and then ends everything.
            look = stop.exit_code == INTERRUPTED
            if look:
                say(f"Writing {output_dir / REPORT_FILE}; Ctrl-C makes it short.")
            report.write(result.metrics["train_runtime"], look=look)
        return stop.exit_code
    try:
        _finish(trainer, result.metrics, script_args, report, stop)
    except DivergedError as error:
        return _diverged(error, report, argv, output_dir)
    return 0


def _diverged(error: DivergedError, report: RunReport | None, argv: list[str], output_dir: Path) -> int:
    """What is left to do where numbers are none any more: to say so."""
    if report is not None:
        report.write(look=False, notes=[f"The run stopped: {error}."])
        say(f"fastdpo train: the run diverged: {error}.")
        _say_how_to_resume(argv, output_dir)
    return DIVERGED


def _is_done(checkpoint: Path, args: DPOConfig) -> bool:
    """Whether the run ends at the checkpoint, and its results were written, of which the report is the last."""
    output_dir = args.folder
    at_end = is_end(checkpoint, max_steps=args.max_steps, num_train_epochs=args.num_train_epochs)
    if not at_end or not came_from(output_dir, checkpoint) or not (output_dir / REPORT_FILE).exists():
        return False
    damage = damage_in(output_dir)
    if damage and args.process_index == 0:
        console.print(f"What came of this run in {output_dir} is written again: {'; '.join(damage)}.")
    owes_push = args.push_to_hub and not is_pushed(args)
    if owes_push and not damage and args.process_index == 0:
        console.print(
            f"What came of this run in {output_dir} was not uploaded to its end, and is written and uploaded."
        )
    return not damage and not owes_push


def _take_over(checkpoint: Path | None, args: DPOConfig, parser: TrainParser) -> None:
    """What a run chose for itself when it began, it keeps: the day that templates write, unless one is given."""
    manifest = read_manifest(checkpoint) if checkpoint is not None else None
    asked, _ = parser.asked["template_date"]
    if manifest is not None and asked is None:
        args.template_date = manifest.settings.get("template_date", args.template_date)


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


def _say_what_does_nothing(parser: TrainParser, arguments: tuple[Any, ...]) -> None:
    """Once, of flags that are taken as they are in other people's files."""
    now = {name: value for part in arguments for name, value in vars(part).items()}
    lines = without_effect(parser.asked, now, raises=False)
    if lines and arguments[2].process_index == 0:
        say(f"Flags that do nothing in this run: {'; '.join(lines)}.")


def _say_what_it_trains_on(trainer: DPOTrainer, output_dir: Path) -> None:
    say_what_was_prepared(trainer)
    if trainer.endings is not None and trainer.endings.words:
        console.print(trainer.endings.words)
    if not trainer.packing.reasons:  # a layout that something stood in the way of was announced with the reason
        console.print(f"Batches are laid out in {trainer.packing}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: summary.as_dict() for name, summary in trainer.data_summaries.items()}, indent=2)
    (output_dir / "data_summary.json").write_text(text + "\n", encoding="utf-8")


def _say_where_it_starts(checkpoint: Path | None, output_dir: Path, *, goes_on: bool) -> None:
    """``goes_on``: it was asked for, be it without anything to go on from."""
    removed = remove_torn(output_dir, checkpoint) if goes_on else []
    folder = set_aside(output_dir, checkpoint)
    if removed:
        names = ", ".join(path.name for path in removed)
        console.print(f"What a killed run had begun to write was removed: {names}.")
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
        f"{output_dir} holds checkpoints of an earlier run, and --resume_from_checkpoint was not given.",
        style="bold yellow",
    )
    console.print(
        f"They were moved to {folder}; this run starts from step 0, and replaces the model in {output_dir} when it "
        f"ends.{how}"
    )


def _finish(
    trainer: DPOTrainer,
    metrics: dict[str, float],
    script_args: ScriptArguments,
    report: RunReport | None,
    stop: GentleStop,
) -> None:
    """Save everything, and say where it is."""
    output_dir = trainer.args.folder
    with stop.listening():  # a signal waits until what the run was for is written
        with contextlib.suppress(UploadError):  # which comes after the saving, and once more at the end
            trainer.save_model(str(output_dir))
        trainer.save_metrics("train", metrics)
        trainer.save_state()
        trainer.create_model_card(dataset_name=label_of(script_args))
        if report is not None:
            _note_results(trainer.args)  # before the report, which tells that nothing is left to be done
    if report is not None:
        report.write(metrics["train_runtime"], look=not stop.asked)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        what = "adapter and tokenizer" if isinstance(policy, PeftModel) else "model and tokenizer"
        steps = f"{trainer.state.global_step} steps."
        console.print(Text.assemble(("\nDone: ", "bold"), (steps, "bold"), "  ", format_end(trainer.state)))
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
        try:
            trainer.push_to_hub(dataset_name=label_of(script_args))  # which saves the model once more
        except UploadError as error:
            raise UsageError(
                f"all is in {output_dir}, but its upload to the Hub failed: {error}\n  The same command with "
                "--resume_from_checkpoint auto makes up for it."
            ) from error
        if report is not None:
            _note_results(trainer.args)
            note_push(trainer.args)


def _note_results(args: DPOConfig) -> None:
    """Take digests of the model or adapter and its tokenizer; of a card, which people go on writing, none."""
    names = [path.name for path in args.folder.iterdir() if path.is_file()]
    names = [name for name in names if name != CARD_FILE and not is_run_record(name)]
    write_manifest(args.folder, names, settings=settings_of(args))


def _say_how_to_resume(argv: list[str], output_dir: Path) -> None:
    there = find_checkpoints(output_dir)
    if not there:
        say("Stopped. No checkpoint had been written, so there is nothing to resume from.")
        return
    say(f"Stopped. The last checkpoint is {there[-1]}. To go on:\n  {resume_command(argv)}")
