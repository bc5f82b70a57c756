"""The pairs that every arm trains on: a sample of a file, or made-up ones, in a random order and grouped by length.

With more than two answers to a prompt, further ones are dealt from other rows: their lengths are what costs.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import tokenizers
import torch
from datasets import Dataset
from end_to_end.cases import TrainCase
from transformers import PreTrainedTokenizerFast
from transformers.trainer_pt_utils import get_length_grouped_indices

from fastdpo.data.files import load_preferences

Row = dict[str, Any]

ORDERS = ("shuffled", "grouped")

_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
_MADE_UP_ROWS = 200
_WORDS = ["river", "bridge", "window", "bread", "letter", "garden", "winter", "harbour", "lamp", "road", "stone", "tea"]


def read_rows(file: Path | None, max_length: int) -> list[Row]:
    """The pairs of a file; without one, made-up chats of all lengths up to about ``max_length`` words in all."""
    if file is not None:
        return list(load_preferences(str(file)))
    rng = random.Random(0)

    def text(most: int) -> str:
        # Many are short, some are long.
        count = min(most, max(4, round(rng.lognormvariate(0, 0.8) * most / 4)))
        return " ".join(f"{rng.choice(_WORDS)}{rng.randrange(20)}" for _ in range(count))

    def message(role: str, most: int) -> list[dict[str, str]]:
        return [{"role": role, "content": text(most)}]

    share = max_length // 3
    return [
        {
            name: message(role, share)
            for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
        }
        for _ in range(_MADE_UP_ROWS)
    ]


def train_tokenizer(rows: list[Row], vocab_size: int, file: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the rows' own text, saved where :func:`load_tokenizer` finds it."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((text for row in rows for value in row.values() for text in _texts(value)), trainer)
    core.save(str(file))
    return load_tokenizer(file)


def load_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [message["content"] for message in value] if isinstance(value, list) else []


def sequence_lengths(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, int, int]]:
    """Tokens of the prompt, of prompt and chosen, and of prompt and rejected, uncut, row by row."""

    def count(prompt: Any, completion: Any) -> int:
        if isinstance(prompt, str):
            text = prompt + (completion or "")
        else:
            text = tokenizer.apply_chat_template(
                prompt + (completion or []), tokenize=False, add_generation_prompt=completion is None
            )
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return [
        (count(row["prompt"], None), count(row["prompt"], row["chosen"]), count(row["prompt"], row["rejected"]))
        for row in rows
    ]


def sample(rows: list[Row], lengths: list[tuple[int, int, int]], count: int, max_length: int) -> list[int]:
    """``count`` rows whose lengths are spread as those of all are, shuffled.

    They are taken at even distances from all rows sorted by length: a small sample at random might hold the longest
    ones, or none. Rows whose prompt leaves no room for a completion, and pairs of equals, are left out beforehand, as
    the trainers do.

    Raises:
        ValueError: there are not so many.
    """
    usable = [
        i
        for i, (prompt, _, _) in enumerate(lengths)
        if prompt < max_length and rows[i]["chosen"] != rows[i]["rejected"]
    ]
    if count > len(usable):
        raise ValueError(
            f"the run takes {count} pairs, each once, but the data has {len(usable)} that fit into {max_length} "
            "tokens; take fewer steps"
        )
    usable.sort(key=lambda i: sum(min(length, max_length) for length in lengths[i][1:]))
    chosen = [usable[(2 * k + 1) * len(usable) // (2 * count)] for k in range(count)]
    random.Random(0).shuffle(chosen)
    return chosen


def orders(indices: list[int], lengths: list[tuple[int, int, int]], pairs: int, warmup: int) -> dict[str, list[int]]:
    """The rows shuffled, and grouped as Trainer's group_by_length does; the first ``warmup`` steps are the same."""
    first, rest = indices[: warmup * pairs], indices[warmup * pairs :]
    longest = [max(lengths[i][1:]) for i in rest]
    grouped = get_length_grouped_indices(longest, pairs, generator=torch.Generator().manual_seed(0))
    return {"shuffled": first + rest, "grouped": first + [rest[k] for k in grouped]}


def system_message(tokenizer: PreTrainedTokenizerFast, tokens: int) -> str:
    """Words of at least so many tokens."""
    rng = random.Random(0)
    text = ""
    while len(tokenizer(text)["input_ids"]) < tokens:
        text = f"{text} {rng.choice(_WORDS)}".strip()
    return text


def deal(rows: list[Row], prompts: list[int], case: TrainCase, system: str) -> list[Row]:
    """The rows of these numbers as groups: a prompt, ``completions`` and their ``scores``.

    A prompt has its own two answers, and those of other rows beyond them, no two alike. Where ``system`` is not empty
    it goes before it, as a message of that role.
    """
    rng = random.Random(0)
    pool = [row[side] for row in rows for side in ("chosen", "rejected")]
    groups = []
    for i in prompts:
        answers = [rows[i]["chosen"], rows[i]["rejected"]]
        while len(answers) < case.answers:
            other = rng.choice(pool)
            if other not in answers:
                answers.append(other)
        prompt = rows[i]["prompt"]
        if system:
            first = [{"role": "system", "content": system}]
            prompt = system + "\n" + prompt if isinstance(prompt, str) else first + prompt
        scores = [float(score) for score in range(case.answers)]
        rng.shuffle(scores)
        groups.append({"prompt": prompt, "completions": answers, "scores": scores})
    return groups


def pairs_of_group(group: Row) -> list[Row]:
    """Every two of its answers, the better one chosen."""
    ranked = sorted(range(len(group["scores"])), key=lambda i: -group["scores"][i])
    answers = [group["completions"][i] for i in ranked]
    return [
        {"prompt": group["prompt"], "chosen": chosen, "rejected": rejected}
        for k, chosen in enumerate(answers)
        for rejected in answers[k + 1 :]
    ]


def describe(lengths: list[tuple[int, int, int]], indices: list[int], max_length: int) -> dict[str, Any]:
    """What a table's heading says about the pairs."""
    cut = [tuple(min(length, max_length) for length in lengths[i]) for i in indices]
    sequences = sum(chosen + rejected for _, chosen, rejected in cut)
    return {
        "rows": len(cut),
        "tokens": sequences,
        "prompt_share": 2 * sum(prompt for prompt, _, _ in cut) / sequences,
        "median_length": statistics.median(max(chosen, rejected) for _, chosen, rejected in cut),
    }


def save_rows(rows: list[Row], file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load_rows(file: Path) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
