"""``fastdpo eval``: whether a model is better, on held-out pairs, and how sure that is."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastdpo.commands.evaluation_tables import print_evaluation
from fastdpo.commands.flags import ModelArguments, ScriptArguments, TrainParser
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
_FOLDER = "evaluation"

EPILOG = """\
Written into --output_dir (by default the folder of the first model, where it has one): evaluation.html, a page to read;
evaluation.json, all figures and what each model says of each pair; judge_answers.jsonl, what a judge has answered. The
report of a training in a model's folder gets a link to the page.

Accuracy is the share of pairs in which a model prefers the chosen answer: by reward (its log-ratio to the reference, as
in training), by likelihood, and by likelihood per token. Rewards need a reference: an adapter's is its base; else give
--model_name_or_path, what the models were trained from. docs/guides/evaluate.md says how all of it is computed.

examples:
  what a training made, on pairs that it has not seen:
    fastdpo eval --model my-model --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl \\
        --dataset_test_split 'train[90%:]'

  two adapters and their base, which is loaded once, by a column of the data:
    fastdpo eval --model adapter-a adapter-b Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --slice_by source

  with the training's file of flags: its output_dir, on the pairs that it holds out:
    fastdpo eval --config run.yaml

  and with a judge, whose key is read from the environment:
    fastdpo eval --config run.yaml --judge_url https://api.openai.com/v1 --judge_model gpt-4.1-mini
"""


class _Gather(argparse.Action):
    """``--model a b --model c`` names three; what a file of flags named before gives way to the command line."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        before = getattr(namespace, self.dest) if self.dest in parser.gathered else []
        parser.gathered.add(self.dest)
        setattr(namespace, self.dest, [*before, *values])


@dataclass
class EvalArguments:
    """What is evaluated, how it is looked at, and who judges."""

    model: list[str] | None = field(
        default=None,
        metadata={
            "help": "Models to evaluate, or adapters: Hub ids, or folders. By default the one in --output_dir, or "
            "--model_name_or_path alone.",
            "action": _Gather,
        },
    )
    slice_by: list[str] | None = field(
        default=None,
        metadata={"help": "Columns of the data whose values are looked at one by one.", "action": _Gather},
    )
    resamples: int = field(default=2000, metadata={"help": "How often prompts are drawn anew for the intervals."})
    confidence: float = field(default=0.95, metadata={"help": "The chance with which an interval holds the truth."})
    judge_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of a server with OpenAI's protocol: http://localhost:8000/v1. Completions of held-out "
            "prompts are judged there: of each two models, or of one model beside the chosen answers."
        },
    )
    judge_model: str | None = field(default=None, metadata={"help": "The judge's name on that server."})
    judge_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the key, where one is needed."}
    )
    judge_prompts: int = field(default=100, metadata={"help": "Most prompts to have judged; each costs two questions."})
    judge_workers: int = field(default=4, metadata={"help": "Questions that are asked at a time."})
    judge_temperature: float | None = field(
        default=0.0, metadata={"help": "Of the judge's answers; below 0 to leave it to the server."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Where judged completions are cut."})
    temperature: float = field(
        default=0.0, metadata={"help": "Of judged completions: 0 takes the likeliest token each time."}
    )

    def __post_init__(self) -> None:
        for name in ("judge_prompts", "judge_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be at least 1")


_OF_JUDGE = (*(f.name for f in fields(EvalArguments) if f.name.startswith("judge")), "max_new_tokens", "temperature")


class EvalParser(TrainParser):
    """The flags of ``fastdpo train``, so that its files serve as they are, and those of an evaluation."""

    command = "eval"
    summary = "whether a model is better, on held-out pairs, and how sure that is."
    dataclasses = (ScriptArguments, ModelArguments, *TrainParser.dataclasses[2:], EvalArguments)
    help_epilog = EPILOG
    others_title = "flags of `fastdpo train` that are accepted, and change nothing here (--help_all describes them)"

    def __init__(self) -> None:
        self.gathered: set[str] = set()
        super().__init__()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.gathered.clear()
        return super().parse_known_args(args, namespace)

    def groups(self) -> dict[str, Sequence[str]]:
        return {
            "general": ["help", "help_all", "config"],
            "models": [
                "model",
                "model_name_or_path",
                "model_revision",
                "dtype",
                "attn_implementation",
                "load_in_4bit",
                "load_in_8bit",
                "model_init_kwargs",
                "trust_remote_code",
            ],
            "pairs": [
                *(f.name for f in fields(ScriptArguments) if "stream" not in f.name and "shuffle" not in f.name),
                *("max_length", "truncation_mode", "pairs", "score", "end_token", "chat_template_path"),
                *("template_date", "strict", "dataset_num_proc"),
            ],
            "evaluation": ["output_dir", "beta", "slice_by", "resamples", "confidence", "seed"],
            "judge": _OF_JUDGE,
            "computing": [
                *("per_device_eval_batch_size", "packing", "max_tokens_per_batch", "bf16", "fp16", "use_cpu"),
                "disable_tqdm",
            ],
        }


def run(argv: list[str]) -> int:
    """Run ``fastdpo eval``.

    Args:
        argv: the words after ``fastdpo eval``.

    Returns:
        0.

    Raises:
        UsageError: the flags, the pairs or a model cannot be used, or the judge does not answer.
    """
    parser = EvalParser()
    script_args, model_args, training_args, _, eval_args = parser.read(argv)
    asked = {name for name, (value, default) in parser.asked.items() if value != default}
    check_names(output_dir=training_args.output_dir)
    if training_args.world_size > 1:
        raise UsageError("an evaluation runs in one process; start it without a launcher.")
    models, reference = _models(eval_args, model_args, training_args, asked)
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
    with bad_writes(folder):
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
    return 0


def _models(
    eval_args: EvalArguments, model_args: ModelArguments, training_args: DPOConfig, asked: set[str]
) -> tuple[list[str], str | None]:
    """The models, and the reference, where it is named."""
    start = model_args.model_name_or_path
    if eval_args.model:
        models, reference = eval_args.model, start
    elif "output_dir" in asked and _is_model(training_args.folder):
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
    return first if first.is_dir() else Path(_FOLDER)


def _judging(eval_args: EvalArguments, training_args: DPOConfig, folder: Path, asked: set[str]) -> Judging | None:
    if eval_args.judge_url is None:
        for name in _OF_JUDGE:
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
