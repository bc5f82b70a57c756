"""Whether a model computes the same in packed rows as in padded ones.

That it honours our attention and our positions is not taken on trust: made-up rows are scored in the layout and padded,
and the two must agree. They are longer than the lengths in the model's configuration that training can reach, because
layers may change there; and they are scored in float32, because 16 bits hide small faults.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fastdpo.data.terms import first_line
from fastdpo.model.attention import RowAttention
from fastdpo.model.attention_backends import RowsNotSupportedError
from fastdpo.model.config_lengths import lengths_in, longest_position
from fastdpo.model.language_model import described, vocabulary_rows
from fastdpo.model.made_up import SHORT, UNLIMITED, MadeUp, made_up
from fastdpo.model.packing import PackedRow
from fastdpo.model.precision import HALVES, in_float32
from fastdpo.model.recurrent import SEPARABLE, kinds_of_layers, missing_package, stateful_kinds
from fastdpo.model.recurrent_check import fault_in_training
from fastdpo.model.rounding import at_most_rounding, moved_by_last_place, root_mean_square
from fastdpo.model.scoring import Scorer, evaluating, score_row

# A share of what a wrong attention changes: rounding has to stay below it for anything to be told.
_SHARE = 0.1
# In 16 bits, how many times as far from the truth packed rows may be as padded ones, by the root of the mean square.
_ERRORS = 2.0
# In 16 bits, how many times as far from padded rows packed ones may be as padded ones are from themselves, their
# embeddings moved in the last place: measured, right ones are at most 0.6 times as far, and wrong ones 3 times or more
# in models whose attention looks at positions.
_OF_ROUNDING = 1.5
# One token that rounding sends to another expert changes a sequence or two. A fault is also there with other tokens.
_TRIES = 2

# Layers whose tokens meet in the attention alone, which is told of all that they see.
PLAIN_LAYERS = ("full_attention", "sliding_attention", "attention")


class RowsCheck:
    """What a model says about made-up sequences in padded rows, and whether packed ones say the same.

    It costs a few forwards: two of padded rows; for each layout three of some hundred tokens, and, where the
    configuration has a length that training can pass, one of a row that is a little longer, and at most as long as one
    in training. In 16 bits, two more.

    Args:
        scorer: the model.
        max_length: most tokens of a sequence in training; None for no limit.
        row_tokens: most tokens of a row in training; None for no limit.
        device: where the model runs.
        dtype: what it computes in.
    """

    def __init__(
        self, scorer: Scorer, max_length: int | None, row_tokens: int | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._scorer, self._device, self._dtype = scorer, device, dtype
        self._max_length = max_length
        self._name = described(scorer.lm)
        self._config = scorer.lm.config.get_text_config()
        limits = [limit for limit in (max_length, longest_position(self._config)) if limit is not None]
        self._longest = min(limits, default=UNLIMITED)
        self._row_tokens = UNLIMITED if row_tokens is None else row_tokens
        self._truths: dict[int, _Truth] = {}
        self._stateful = sorted(stateful_kinds(scorer.lm))
        self._differs = "computes something else in packed rows than in padded ones"
        if self._stateful:
            self._differs += f" (its {', '.join(self._stateful)} layers carry a state from one sequence into the next)"
        self._has_float32: bool | None = None

    def check(self, layout: str, backend: str) -> None:
        """See that a layout, with a back end, gives what padded rows give.

        Args:
            layout: ``shared`` or ``repeated``.
            backend: one of :data:`fastdpo.model.attention.BACKENDS`.

        Raises:
            RowsNotSupportedError: it does not, or the model cannot do it; the message says why.
        """
        self._look_at_code(layout)
        with self._worded(), torch.no_grad(), evaluating(self._scorer.root):
            attention = RowAttention(self._scorer.model, backend)
            self._scorer.head.inspect_once(self._scorer.root)
            with self._looking() as dtype:
                is_wide = torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps
                # Back ends that take 16 bits alone come after; the layout is the model's, whatever its attention.
                inner = RowAttention(self._scorer.model, "sdpa") if is_wide else attention
                for seed in range(_TRIES):
                    fault = self._fault(seed, inner, layout, dtype)
                    if fault is None or fault.is_widespread:
                        break
            if fault is not None:
                raise RowsNotSupportedError(f"{self._name} {fault.words}")
            if is_wide and (backend != "sdpa" or torch.finfo(dtype).eps < torch.finfo(self._dtype).eps):
                self._compare_narrow(attention, layout)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[torch.dtype]:
        """The precision in which made-up rows are scored: float32, where the model has that."""
        if self._has_float32 is None:
            try:
                with in_float32(self._scorer.model, self._device, self._dtype):
                    self._truth(0)
                self._has_float32 = True
            except (torch.OutOfMemoryError, RowsNotSupportedError):
                raise
            except Exception:
                if self._dtype not in HALVES:
                    raise
                self._has_float32 = False  # some kernels of linear attention take 16 bits alone
        if self._has_float32:
            with in_float32(self._scorer.model, self._device, self._dtype) as dtype:
                yield dtype
        else:
            yield self._dtype

    def _look_at_code(self, layout: str) -> None:
        """What is known without running the model, for words that a person can use."""
        others = kinds_of_layers(self._scorer.lm) - set(PLAIN_LAYERS)
        in_both = others - SEPARABLE
        # What stands in the way of both layouts is said of both, in the same words.
        if others := in_both if layout == "repeated" else in_both or others:
            raise RowsNotSupportedError(f"{self._name} has layers of the kind {', '.join(sorted(others))}")
        parameters = inspect.signature(self._scorer.lm.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        if not takes_any and "position_ids" not in parameters:
            raise RowsNotSupportedError(f"{self._name} takes no position_ids, and counts positions by itself")

    def _no_interface(self) -> RowsNotSupportedError:
        return RowsNotSupportedError(
            f"the attention of {self._name} does not go through transformers' attention interface"
        )

    @contextlib.contextmanager
    def _worded(self) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, RowsNotSupportedError):
            raise
        except Exception as error:
            # Models fail in their own ways when they are called in one that they do not know.
            package = missing_package(error)
            if package is not None:
                raise RowsNotSupportedError(
                    f"the {', '.join(self._stateful)} layers of {self._name} carry their state from one sequence of a "
                    f"row into the next, unless the packages of their kernels are there ({package} is not)"
                ) from error
            if not self._stateful and not getattr(self._scorer.lm, "_supports_attention_backend", False):
                raise self._no_interface() from error
            raise RowsNotSupportedError(
                f"{self._name} does not take packed rows: its forward stops there ({type(error).__name__}: "
                f"{first_line(str(error))})"
            ) from error

    def _truth(self, seed: int) -> _Truth:
        if seed not in self._truths:
            vocabulary = vocabulary_rows(self._scorer.lm)
            made = made_up(
                vocabulary,
                lengths_in(self._config),
                longest=self._longest,
                row_tokens=self._row_tokens,
                seed=seed,
            )
            padded = made.padded(self._scorer, self._device)
            with moved_by_last_place(self._scorer.lm):
                moved = made.padded(self._scorer, self._device)
            noise = torch.cat(moved) - torch.cat(padded)
            self._truths[seed] = _Truth(made, padded, noise)
        return self._truths[seed]

    def _fault(self, seed: int, attention: RowAttention, layout: str, dtype: torch.dtype) -> _Fault | None:
        """What is wrong with the layout, if anything is."""
        truth = self._truth(seed)
        made = truth.made
        short = range(SHORT)
        row = made.row(layout, self._device, short)
        with attention.watched() as windows:
            packed = self._score(row)
        if not windows and not self._stateful:
            raise self._no_interface()
        self._look_at_windows(windows)
        with attention.active():
            changed = made.changed()
            changed_row = changed.row(layout, self._device, short)
            moved = self._score(changed_row)
            in_rows = made.of_row(packed, row, short)
            if len(made.order) > SHORT:
                whole = made.row(layout, self._device)
                in_rows += made.of_row(self._score(whole), whole)
        plain = self._scorer.head.score_row(self._scorer.root, row.input_ids, row.scored, row.targets).logps
        # As a plain text, the row has another attention: how far off a wrong one is.
        wrong = torch.cat([a - truth.padded[i] for i, a in made.of_row(plain, row, short)])
        errors = [(logps - truth.padded[i]) for i, logps in in_rows]
        largest = max(float(x.abs().max()) for x in truth.padded)
        allowed = min(at_most_rounding(largest, truth.noise, dtype), _SHARE * float(wrong.abs().max()))
        over = [error for error in errors if not float(error.abs().max()) <= allowed]  # so that NaN is over
        if over:
            worst = max(float(error.abs().max().nan_to_num(torch.inf)) for error in over)
            return _Fault(
                f"{self._differs}: log-probabilities of a made-up row "
                f"differ by {worst:.2g} nats, where {allowed:.2g} would be rounding",
                is_widespread=4 * len(over) > len(errors),
            )
        if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
            far, rounding = root_mean_square(torch.cat(errors)), root_mean_square(truth.noise)
            if not far <= _OF_ROUNDING * rounding:
                return _Fault(
                    f"{self._differs}: log-probabilities of a made-up row "
                    f"differ by {far:.2g} nats (root of the mean square), where rounding makes {rounding:.2g}",
                    is_widespread=True,
                )
        # How many tokens an expert gets, and so how its products round, depends on others.
        _, *others = made.of_row(packed, row, short)
        _, *of_changed = changed.of_row(moved, changed_row, short)
        leak = max(float((b - a).abs().max()) for (_, a), (_, b) in zip(others, of_changed, strict=True))
        if not leak <= allowed:
            return _Fault(
                "lets one completion of a packed row depend on another: its log-probabilities moved by "
                f"{leak:.2g} nats when the other's tokens changed",
                is_widespread=True,
            )
        if self._stateful:
            words = fault_in_training(self._scorer, attention, row, packed, allowed)
            return None if words is None else _Fault(words, is_widespread=True)
        return None

    def _score(self, row: PackedRow) -> Tensor:
        return score_row(self._scorer.head, self._scorer.root, row).logps

    def _look_at_windows(self, windows: list[int | None]) -> None:
        words = window_not_passed_on(self._config, windows, self._max_length)
        if words is not None:
            raise RowsNotSupportedError(f"{self._name} {words}")

    def _compare_narrow(self, attention: RowAttention, layout: str) -> None:
        """See that in what the model computes in, packed rows are no further from float32 than padded ones are."""
        truth = next(iter(self._truths.values()))
        true = torch.cat(truth.padded)
        of_padded = root_mean_square(torch.cat(truth.made.padded(self._scorer, self._device)) - true)
        row = truth.made.row(layout, self._device)
        with attention.active():
            packed = self._score(row)
        errors = torch.cat([logps - truth.padded[i] for i, logps in truth.made.of_row(packed, row)])
        of_packed = root_mean_square(errors)
        if not of_packed <= _ERRORS * of_padded:
            raise RowsNotSupportedError(
                f"{self._name} is less exact in packed rows than in padded ones: log-probabilities of a made-up row "
                f"are {of_packed:.2g} nats off in {self._dtype}, those of padded rows {of_padded:.2g}"
            )


def window_not_passed_on(config: PreTrainedConfig, windows: list[int | None], max_length: int | None) -> str | None:
    """What is wrong, in words that follow a model's name, where layers have windows that their attention is not told.

    Args:
        config: of the text model.
        windows: what the attention of each layer was told.
        max_length: most tokens of a sequence; None for no limit.
    """
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is None or (max_length is not None and window >= max_length):
        return None
    layer_types = getattr(config, "layer_types", None) or ()
    sliding = layer_types.count("sliding_attention") if layer_types else len(windows)
    if sum(w is not None for w in windows) >= sliding:
        return None
    return f"has a sliding window of {window} tokens, which it does not pass on to its attention"


@dataclass(frozen=True)
class _Truth:
    """Made-up sequences, their log-probabilities in padded rows, and by how much these move with the last place."""

    made: MadeUp
    padded: list[Tensor]
    noise: Tensor


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a layout, in words that follow the model's name."""

    words: str
    is_widespread: bool


def check_rows(
    scorer: Scorer,
    layout: str,
    backend: str,
    max_length: int | None,
    device: torch.device,
    dtype: torch.dtype,
    row_tokens: int | None = None,
) -> None:
    """:meth:`RowsCheck.check`, once.

    Raises:
        RowsNotSupportedError: they do not agree, or the model cannot do it; the message says why.
    """
    RowsCheck(scorer, max_length, row_tokens, device, dtype).check(layout, backend)
