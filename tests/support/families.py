"""Chat templates of many families, re-made small with what is peculiar to each; and TRL's own."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import trl
from toy_data import make_tokenizer
from transformers import PreTrainedTokenizerFast

_FOLDER = Path(__file__).parent / "templates"
_SPECIAL = re.compile(
    r"<\|\w+>|<\w+\|>|<[|｜][\w▁/ -]+[|｜]>|\[\|\w+\|\]|<extra_id_\d>"
    r"|</?(?:start_of_turn|end_of_turn|end_of_utterance|sop)>"
    r"|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|gMASK)\]"
)
# What templates put together of pieces.
_PUT_TOGETHER = ["<|system|>", "<|user|>", "<|assistant|>", "[|system|]", "[|user|]", "[|assistant|]"]


def family_template(name: str) -> str:
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


FAMILIES = sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def trl_templates() -> dict[str, str]:
    """The templates that the installed TRL ships, by name."""
    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


@cache
def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """The toy tokenizer with this template, and its special tokens as such."""
    tokenizer = make_tokenizer()
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys([*_SPECIAL.findall(template), *_PUT_TOGETHER]) if token not in known]
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    tokenizer.chat_template = template
    return tokenizer
