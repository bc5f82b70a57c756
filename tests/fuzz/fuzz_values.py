"""Values, rows and texts from a fuzzer's bytes: made of the words that the readers look for, and of nonsense."""

from __future__ import annotations

import json
from typing import Any

import atheris

from fastdpo.data.formats.registry import FORMATS

COLUMNS = sorted({name for each in FORMATS.values() for name in each.reads or ()} | {"prompt", "chosen", "rejected"})
KEYS = [
    *COLUMNS,
    *("role", "content", "from", "value", "type", "text", "name", "arguments", "function", "tool_calls", "loss_weight"),
    *(
        "score",
        "rank",
        "label",
        "id",
        "parent_id",
        "message_tree_id",
        "weight",
        "input",
        "output",
        "answer",
        "",
        "\u2028",
    ),
    *("ref_chosen_logps", "ref_rejected_logps", "tools", "chat_template_kwargs", "winner", "turn", "prompt_ids"),
]
WORDS = [
    *(
        "user",
        "assistant",
        "system",
        "tool",
        "tool_call",
        "tool_response",
        "human",
        "gpt",
        "prompter",
        "text",
        "reasoning",
    ),
    *(
        "model_a",
        "model_b",
        "tie",
        "A",
        "B",
        "1",
        "0",
        "true",
        "null",
        "[]",
        "{}",
        '[{"role": "user"}]',
        "nan",
        "1e999",
    ),
    *(
        '{"name": "f", "arguments": {}}',
        "What?",
        " ",
        "",
        "\x00",
        "\x1b[31m",
        "\u202e",
        "é",
        "😀",
        "a\r\nb",
        "[" * 3000,
    ),
    *("9" * 5000, '{"a":' * 2000, "[INST] <<SYS>>", "\n\nHuman: hi\n\nAssistant: ho", "<|im_start|>user\nx<|im_end|>"),
]
# More than parsers take: of digits, of depth, of text.
TOO_MUCH = (b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"(" * 300, b'"' + b"x" * 200_000)
NUMBERS = [0, 1, -1, 2, 10, 2**31, 2**53 + 1, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")]


class Source:
    """What is drawn from the bytes of one input."""

    def __init__(self, data: bytes):
        self.bytes = atheris.FuzzedDataProvider(data)

    def index(self, size: int) -> int:
        return self.bytes.ConsumeIntInRange(0, size - 1)

    def one_of(self, values: Any) -> Any:
        return values[self.index(len(values))]

    def flag(self, of: int = 2) -> bool:
        """With a chance of one in so many; never when the bytes are used up."""
        return bool(self.bytes.remaining_bytes()) and self.index(of) == 0

    def text(self) -> str:
        if self.flag(3):
            return self.bytes.ConsumeUnicodeNoSurrogates(self.index(20))
        return self.one_of(WORDS)

    def message(self) -> Any:
        message = {self.one_of(("role", "role", "from", "content", "weight")): self.one_of(WORDS)}
        message[self.one_of(("content", "value", "text"))] = self.text() if self.flag() else self.value(2)
        while self.flag(3):
            message[self.one_of(KEYS)] = self.value(2)
        return message

    def value(self, depth: int = 3) -> Any:
        kind = self.index(9)
        if kind < 3 or not self.bytes.remaining_bytes():
            return self.text()
        if kind == 3:
            return self.one_of((None, True, False))
        if kind == 4:
            return self.one_of(NUMBERS)
        if kind == 5 or depth == 0:
            return [self.message() for _ in range(self.index(4))] if depth else self.text()
        if kind == 6:
            return self.message()
        if kind == 7:
            return [self.value(depth - 1) for _ in range(self.index(4))]
        return {self.one_of(KEYS): self.value(depth - 1) for _ in range(self.index(5))}

    def row(self, columns: Any = KEYS) -> dict[str, Any]:
        return {self.one_of(columns): self.value() for _ in range(1 + self.index(6))}

    def rows(self) -> tuple[str | None, list[dict[str, Any]]]:
        """A format's name and rows that look a little like its own."""
        name = self.one_of(sorted(FORMATS))
        columns = FORMATS[name].reads or COLUMNS
        rows = []
        for _ in range(1 + self.index(3)):
            row = {} if self.flag(4) else {column: self.value() for column in columns}
            if self.flag(4):
                row |= self.row()
            rows.append(row)
        return (name if self.flag(3) else None), rows

    def rest(self) -> bytes:
        return self.bytes.ConsumeBytes(self.bytes.remaining_bytes())

    def spoilt(self, text: bytes) -> bytes:
        """The bytes with some of them replaced, taken out, repeated or put in."""
        for _ in range(self.index(4)):
            at = self.index(len(text) + 1)
            end = min(len(text), at + self.index(5))
            put = self.one_of(
                (*TOO_MUCH, b"", b"\x00", b'"', b"\n", b"\xff", b"\\ud800", b"{", b"]", b"'", b",", text[at : at + 40])
            )
            text = text[:at] + put + text[end:]
        return text

    def json_text(self, value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=self.flag()).encode("utf-8", "surrogatepass")
