"""A tokenizer trained on the spot and preference rows made up for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% if tools %}<|system|>tools: {{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking %}<think>{% endif %}{% endif %}"
)
SENTENCES = [
    "The sky over the harbour turned grey before the ferry came in.",
    "Bread rises faster in a warm kitchen than on a cold window sill.",
    "How many bridges cross the river in the old town?",
    "There are seven, and the oldest is made of wood.",
    "I do not know; please look at the map by the station.",
    "A good knife is sharp, heavy, and kept dry. Ünïcode, 漢字 and 🙂 are kept too.",
]


def make_tokenizer(vocab_size: int = 384, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text survives encoding and decoding."""
    specials = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 4, trainer)
    if bos:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def text_rows(count: int = 12) -> list[dict[str, Any]]:
    """Explicit prompt, strings, of different lengths."""
    size = len(SENTENCES)
    return [
        {
            "prompt": f"{SENTENCES[i % size]} {i}:",
            "chosen": " " + " ".join(SENTENCES[: 1 + i % 3]),
            "rejected": " " + SENTENCES[(i + 1) % size],
        }
        for i in range(count)
    ]


def group_rows(count: int) -> list[dict[str, Any]]:
    """Prompts with 2 to 5 answers and their scores, in no order of how good they are, and without ties."""
    rows = []
    for i in range(count):
        answers = [f" {SENTENCES[(i + j) % len(SENTENCES)]} {j}" for j in range(2 + i % 4)]
        scores = [(3 * j + i) % len(answers) + 0.5 * j for j in range(len(answers))]
        rows.append({"prompt": f"{SENTENCES[i % len(SENTENCES)]} {i}:", "completions": answers, "scores": scores})
    return rows


def chat_rows(count: int = 12) -> list[dict[str, Any]]:
    """Explicit prompt, message lists; every third has a conversation behind it."""
    rows = []
    for i, row in enumerate(text_rows(count)):
        history = [user("Good day."), assistant("Good day to you.")] if i % 3 == 0 else []
        rows.append(
            {
                "prompt": [*history, user(row["prompt"])],
                "chosen": [assistant(row["chosen"])],
                "rejected": [assistant(row["rejected"])],
            }
        )
    return rows


def without_prompt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with the prompt inside chosen and rejected."""
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
