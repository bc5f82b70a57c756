"""``fastdpo eval``: whether a model is better, on held-out pairs, and how sure that is."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from fastdpo.commands.arguments import ModelArguments
from fastdpo.commands.evaluation_flags import FOLDER, OF_JUDGE, EvalArguments, EvalParser
from fastdpo.commands.evaluation_tables import print_evaluation
from fastdpo.commands.pairs import label_of, load_held_out
from fastdpo.commands.preparation import bad_writes, check_names, console, say
from fastdpo.commands.trainer_from_flags import init_kwargs_of
from fastdpo.errors import UsageError, bad_input
from fastdpo.evaluation.judge_answers import JudgeAnswers
from fastdpo.evaluation.judge_client import JudgeClient
from fastdpo.evaluation.page import write_page
from fastdpo.evaluation.record import EvaluationRecord, write_results
from fastdpo.evaluation.run import Judging, evaluate
from fastdpo.evaluation.statistics import Resampling
from fastdpo.model.generation import Drawing
from fastdpo.report.evaluation_link import EVALUATION_FILE, link_report
from fastdpo.report.facts import command_line, device_name, environment
from fastdpo.report.recorder import REPORT_FILE
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.secrets import redacted

RESULTS_FILE, ANSWERS_FILE = "evaluation.json", "judge_answers.jsonl"
_IF_FULL = "Make room, or name another folder (--output_dir); what a judge has answered is kept"


def run(argv: list[str]) -> int:
    """Run ``fastdpo eval``.

    Args:
        argv: the words after ``fastdpo eval``.

    Returns:
        0.

    Raises:
        UsageError: the flags, the pairs or a model cannot be used; or the judge does not answer, after all else was
            written.
    """
    parser = EvalParser()
    script_args, model_args, training_args, _, eval_args = parser.read(argv)
    asked = {name for name, (value, default) in parser.asked.items() if value != default}
    check_names(output_dir=training_args.output_dir)
    if training_args.world_size > 1:
        raise UsageError("an evaluation runs in one process; start it without a launcher.")
    has_file = any(word.split("=")[0] == "--config" for word in argv)
    models, reference = _models(eval_args, model_args, training_args, asked, has_file=has_file)
    folder = _folder(models, training_args, asked)
    judging = _judging(eval_args, training_args, folder, asked)
    with bad_input():
        how = Resampling(eval_args.resamples, eval_args.confidence, training_args.seed)
    dataset, which = load_held_out(
        script_args,
        seed=training_args.seed,
        groups=training_args.keeps_groups,
        split_is_asked="dataset_test_split" in asked,
    )
    console.print(f"{len(dataset):,} rows: {label_of(script_args)}, {which}.")
    training_args.model_init_kwargs = init_kwargs_of(model_args, training_args)
    start = time.perf_counter()
    with bad_writes(folder, _IF_FULL):
        with bad_input():
            found = evaluate(
                dataset,
                models,
                reference,
                training_args,
                columns=eval_args.slice_by or (),
                how=how,
                judging=judging,
                say=say,
            )
        if which.startswith("split") and "for there is no" in which:
            found.notes.append(f"These are all rows of {which}: figures are too good if a model was trained on them.")
        names = models[0] if len(models) == 1 else f"{len(models)} models"
        record = EvaluationRecord(
            title=str(redacted(f"{names} on {label_of(script_args)} ({which})")),
            found=found,
            beta=training_args.beta,
            how=how,
            device=device_name(training_args.device),
            seconds=time.perf_counter() - start,
            command=command_line(argv, "eval"),
            judge=None if judging is None else redacted(judging.client.identity),
            environment=environment(training_args.device),
        )
        page = folder / EVALUATION_FILE
        write_results(record, folder / RESULTS_FILE)
        write_page(record, page)
        linked = [name for name in models if link_report(Path(name).expanduser() / REPORT_FILE, page)]
    print_evaluation(record, console)
    console.print(f"\nRead {shlex.quote(str(page))}; all figures are in {shlex.quote(str(folder / RESULTS_FILE))}.")
    for name in linked:
        console.print(f"{shlex.quote(str(Path(name) / REPORT_FILE))} links to it.")
    if found.judge_stopped:
        raise UsageError(found.judge_stopped)
    return 0


def _models(
    eval_args: EvalArguments, model_args: ModelArguments, training_args: DPOConfig, asked: set[str], *, has_file: bool
) -> tuple[list[str], str | None]:
    """The models, and the reference, where it is named.

    A training whose file names no output_dir wrote into one all the same.
    """
    start = model_args.model_name_or_path
    if eval_args.model:
        models, reference = eval_args.model, start
    elif ("output_dir" in asked or has_file) and _is_model(training_args.folder):
        models, reference = [str(training_args.folder)], start
    elif start:
        models, reference = [start], None
    else:
        raise UsageError("--model is needed: Hub models, or folders with one, or adapters.")
    for flag, name in [("--model", name) for name in models] + [("--model_name_or_path", start or "")]:
        # from_pretrained takes a misspelt path for a Hub id, and complains about that.
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if looks_local and not Path(name).expanduser().is_dir():
            raise UsageError(f"{flag} {name}: no such folder.")
    return models, reference


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _folder(models: Sequence[str], training_args: DPOConfig, asked: set[str]) -> Path:
    if "output_dir" in asked:
        return training_args.folder
    first = Path(models[0]).expanduser()
    return first if first.is_dir() else Path(FOLDER)


def _judging(eval_args: EvalArguments, training_args: DPOConfig, folder: Path, asked: set[str]) -> Judging | None:
    if eval_args.judge_url is None:
        for name in OF_JUDGE:
            if name in asked:
                raise UsageError(f"--{name} would have no effect without --judge_url.")
        return None
    if not eval_args.judge_model:
        raise UsageError("--judge_model is needed with --judge_url: the name that the server knows the judge by.")
    if "judge_key_env" in asked and not os.environ.get(eval_args.judge_key_env):
        raise UsageError(
            f"--judge_key_env {redacted(eval_args.judge_key_env)}: the environment has no such variable, or an empty "
            "one. It takes a variable's name; the key itself belongs on no command line."
        )
    temperature = eval_args.judge_temperature
    with bad_input():
        client = JudgeClient(
            eval_args.judge_url,
            eval_args.judge_model,
            os.environ.get(eval_args.judge_key_env) or None,
            None if temperature is None or temperature < 0 else temperature,
        )
        drawing = Drawing(
            eval_args.max_new_tokens,
            eval_args.temperature,
            training_args.seed,
            training_args.per_device_eval_batch_size,
        )
        answers = JudgeAnswers(folder / ANSWERS_FILE)
    return Judging(client, answers, eval_args.judge_prompts, eval_args.judge_workers, drawing)
