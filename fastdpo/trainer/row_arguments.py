"""The training arguments of rows: how they become tokens, which of these are scored, and how batches are laid out."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import cast

from fastdpo.data.comparisons import PAIRS, Choice
from fastdpo.data.settings import SCORES, parse_date
from fastdpo.data.truncation import TRUNCATION_MODES
from fastdpo.model.packing import PACKINGS


@dataclass(repr=False)
class RowArguments:
    """Rows and batches; see :class:`fastdpo.DPOConfig`."""

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Most tokens of prompt and completion together; the rest is cut. None: no limit."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "Which end of a sequence that is too long to keep.", "choices": list(TRUNCATION_MODES)},
    )
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Token to pad with. By default the tokenizer's, or else its end-of-sequence token."},
    )
    padding_free: bool = field(
        default=False, metadata={"help": "No padding: packed rows, or an error where these do not suit."}
    )
    pad_to_multiple_of: int | str | None = field(
        default=None,
        metadata={"help": "Round the length of a batch up to a multiple of this. auto is none."},
    )
    strict: bool = field(
        default=False,
        metadata={"help": "Stop where a pair would be dropped, or is doubtful, before anything is trained."},
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "Rows with several ranked or scored answers: which two are compared. Each answer is computed once. "
            "By default all of rows with 'completions', and neighbours of other formats, which become pairs.",
            "choices": list(PAIRS),
        },
    )
    weight_by_score: bool = field(
        default=False, metadata={"help": "Count each of these pairs as much as its scores (or ranks) differ."}
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={
            "help": "Join pairs of one prompt to a row, in which each answer is computed once. Batch sizes count such "
            "rows. Of a stream, pairs within 1,000 rows."
        },
    )
    score: str = field(
        default="assistant",
        metadata={
            "help": "Which answers of a completion that has several turns are scored: all of the assistant's, or the "
            "last. What lies between them never is.",
            "choices": list(SCORES),
        },
    )
    end_token: str | None = field(
        default=None,
        metadata={"help": "Special token to append to answers after which the chat template writes none."},
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template to use in the place of the tokenizer's: a Jinja file, or the name of one of TRL's, "
            "where TRL is installed, such as qwen3_training."
        },
    )
    template_date: str | None = field(
        default=None,
        metadata={"help": "What chat templates that write the date take for today: 2026-03-01. By default, today."},
    )
    packing: str = field(
        default="auto",
        metadata={
            "help": "How a batch is laid out: shared (packed rows, what sequences begin with in common once), repeated "
            "(packed rows, the prompt before each completion), padded (a padded row for each completion); auto: the "
            "first that suits the model.",
            "choices": list(PACKINGS),
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Take the pairs of a batch in parts of at most this many tokens, one after another, to save "
            "memory. The steps and their gradients are the same."
        },
    )
    activation_offloading: bool = field(
        default=False,
        metadata={
            "help": "Keep activations in the host's memory between forward and backward: less of a GPU's, for time."
        },
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes to tokenize with."})

    @property
    def pad_multiple(self) -> int | None:
        """``pad_to_multiple_of``, which is no text any more once this object is made."""
        return cast("int | None", self.pad_to_multiple_of)

    def _settle_rows(self) -> None:
        """One form for what may be given in several.

        Raises:
            ValueError: it is none of them.
        """
        if isinstance(self.pad_to_multiple_of, str):  # as the command line and YAML have it
            words = self.pad_to_multiple_of
            if words.lower() in ("auto", "none", "null"):  # auto is a multiple on Neuron alone, which is not supported
                self.pad_to_multiple_of = None
            elif words.isdecimal():
                self.pad_to_multiple_of = int(words)
            else:
                raise ValueError(f"pad_to_multiple_of is {words!r}; it should be a number, auto, or None")
        # One day for all of the run: for its rows, and for what its reference is bound to.
        self.template_date = (parse_date(self.template_date) or datetime.date.today()).isoformat()

    def _check_rows(self) -> None:
        """Raises ValueError where these arguments do not fit together."""
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode is {self.truncation_mode!r}; it should be one of {', '.join(TRUNCATION_MODES)}"
            )
        Choice(self.pairs, self.weight_by_score)  # raises
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}; it should be one of {', '.join(SCORES)}")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing is {self.packing!r}; it should be one of {', '.join(PACKINGS)}")
        if self.padding_free and (self.packing == "padded" or self.pad_to_multiple_of is not None):
            other = "packing is 'padded'" if self.packing == "padded" else "pad_to_multiple_of is given"
            raise ValueError(f"padding_free is on, and {other}; leave one of them out")
        for name in ("max_length", "max_tokens_per_batch", "pad_to_multiple_of", "dataset_num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it should be at least 1, or None")
