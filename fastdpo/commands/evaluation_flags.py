"""The flags of ``fastdpo eval``: those of a training, so that its files serve as they are, and its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fastdpo.commands.arguments import ModelArguments, ScriptArguments
from fastdpo.commands.flags import TrainParser

FOLDER = "evaluation"  # where the first model has none of its own

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


# What a training's flags mean here.
_HELP = {
    "model_name_or_path": "What the models were trained from, the reference of their rewards: a Hub id, or a folder. "
    "By default an adapter's base, and nothing for other models.",
    "load_in_4bit": "The models' weights in 4 bits, under an adapter. Needs bitsandbytes.",
    "dataset_train_split": "Split, or slice of one, that --test_split_size holds a part of out; and that is taken "
    "where there is no test split.",
    "dataset_test_split": "Split, or slice of one, to evaluate on.",
    "test_split_size": "Share, or number, of the pairs to hold out and evaluate on: those that a training with the "
    "same --seed holds out.",
    "strict": "Stop where a pair would be dropped, or is doubtful.",
    "output_dir": "Folder for what is found; and the model, where --model is left out. By default the first model's "
    f"folder, or {FOLDER}.",
    "seed": "Of what --test_split_size holds out, of the intervals, and of completions that are drawn.",
    "max_tokens_per_batch": "Take a batch in parts of at most this many tokens, one after another, to save memory.",
    "fp16": "Mixed precision in float16.",
}


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
        default=0.0, metadata={"help": "Of the judge's answers, by default 0; below 0 to leave it to the server."}
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Where judged answers are cut, the models' and the data's alike."}
    )
    temperature: float = field(
        default=0.0, metadata={"help": "Of judged completions; the default, 0, takes the likeliest token each time."}
    )

    def __post_init__(self) -> None:
        for name in ("judge_prompts", "judge_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be at least 1")


OF_JUDGE = (*(f.name for f in fields(EvalArguments) if f.name.startswith("judge")), "max_new_tokens", "temperature")


class EvalParser(TrainParser):
    """The flags of ``fastdpo train``, some of them with another meaning, and those of an evaluation."""

    command = "eval"
    launches = False
    summary = "whether a model is better, on held-out pairs, and how sure that is."
    dataclasses = (ScriptArguments, ModelArguments, *TrainParser.dataclasses[2:], EvalArguments)
    help_epilog = EPILOG
    others_title = "flags of `fastdpo train` that are accepted, and change nothing here (--help_all describes them)"

    def __init__(self) -> None:
        self.gathered: set[str] = set()
        super().__init__()

    def _mend(self, action: argparse.Action) -> None:
        super()._mend(action)
        action.help = _HELP.get(action.dest, action.help)

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
            "judge": OF_JUDGE,
            "computing": [
                *("per_device_eval_batch_size", "packing", "max_tokens_per_batch", "bf16", "fp16", "use_cpu"),
                "disable_tqdm",
            ],
        }
