"""Prompts with completions as rows of tokens, and what models say about them without wasting work on padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from against_rlhf.ledger import Ledger, forward_flops
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from fastdpo.demo.sampling import TokenSamples

# Rows that go through a model together: sorted by length before, so that few of their tokens are padding.
_TOGETHER = 32


@dataclass(frozen=True)
class Rows:
    """B rows, each a prompt of at least one token and its completion; L is the longest row, T the longest completion.

    Padding is on the right, and attention is causal: models need no mask.

    ids:     int64 [B, L]
    prompts: int64 [B], tokens of each prompt
    lengths: int64 [B], tokens of each prompt and its completion, the end token included
    """

    ids: Tensor
    prompts: Tensor
    lengths: Tensor

    @classmethod
    def of_samples(cls, samples: TokenSamples) -> Rows:
        """What was sampled, moved to the left."""
        ids = torch.cat([samples.prompt_ids, samples.tokens], dim=1)
        padding = ~torch.cat([samples.prompt_mask.bool(), samples.mask], dim=1)
        # A stable sort keeps the tokens' order.
        ids = ids.gather(1, padding.int().argsort(dim=1, stable=True))
        lengths = (~padding).sum(dim=1)
        return cls(ids[:, : int(lengths.max())], samples.prompt_mask.sum(dim=1), lengths)

    @classmethod
    def of_ids(cls, rows: Sequence[tuple[list[int], list[int]]]) -> Rows:
        """Of (prompt, completion), each as token ids."""
        ids = pad_sequence([torch.tensor(prompt + completion) for prompt, completion in rows], batch_first=True)
        prompts = torch.tensor([len(prompt) for prompt, _ in rows])
        return cls(ids, prompts, prompts + torch.tensor([len(completion) for _, completion in rows]))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor) -> Rows:
        """The rows at ``index``, int64, trimmed to the longest of them."""
        lengths = self.lengths[index]
        return Rows(self.ids[index, : int(lengths.max())], self.prompts[index], lengths)

    def mask(self) -> Tensor:
        """bool [B, T], True on the tokens of completions."""
        completions = self.lengths - self.prompts
        return torch.arange(int(completions.max()), device=completions.device) < completions[:, None]

    def completions(self) -> Tensor:
        """int64 [B, T], tokens of completions, whatever beyond their end."""
        return self.ids.gather(1, self._before() + 1)

    def before(self, states: Tensor) -> Tensor:
        """Of ``states`` [B, at least L - 1, ...] those from which each completion token is predicted: [B, T, ...]."""
        return states[torch.arange(len(self), device=states.device)[:, None], self._before()]

    def _before(self) -> Tensor:
        steps = torch.arange(int((self.lengths - self.prompts).max()), device=self.ids.device)
        return (self.prompts[:, None] - 1 + steps).clamp(max=self.ids.shape[1] - 2)


def length_batches(rows: Rows) -> list[Tensor]:
    """Indices of rows that go through a model together, int64."""
    return list(rows.lengths.argsort(stable=True).split(_TOGETHER))


def by_length(function: Callable[[Rows], Tensor], rows: Rows) -> Tensor:
    """``function`` of the rows, in their order: [B], or [B, T] with zeros beyond the end.

    It is called with batches of rows of similar length, and gives [b], or [b, t] for the longest completion among them.
    """
    batches = length_batches(rows)
    parts = [function(rows.take(batch)) for batch in batches]
    if parts[0].dim() == 2:
        width = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, width - part.shape[1])) for part in parts]
    return torch.cat(parts)[torch.cat(batches).argsort()]


def completion_logps(model: LlamaForCausalLM, rows: Rows) -> Tensor:
    """Log-probability of each token of the completions, float32 [B, T]; 0 beyond the end. The head sees no other."""
    hidden = model.model(rows.ids[:, :-1], use_cache=False).last_hidden_state
    mask = rows.mask()
    logits = model.lm_head(rows.before(hidden)[mask]).float()
    logps = -F.cross_entropy(logits, rows.completions()[mask], reduction="none")
    return logps.new_zeros(mask.shape).masked_scatter(mask, logps)


def count_policy(ledger: Ledger, part: str, model: str, config: LlamaConfig, rows: Rows, *, trained: bool) -> None:
    """Enters :func:`completion_logps` of ``rows`` by length, and its backward, twice as much, if ``trained``."""
    _count(
        ledger, part, model, config, rows, unread=1, scored=int((rows.lengths - rows.prompts).sum()), trained=trained
    )


def count_scalars(
    ledger: Ledger, part: str, model: str, config: LlamaConfig, rows: Rows, *, unread: int, trained: bool
) -> None:
    """Enters a model with a scalar head, whose operations are left out; it reads all but ``unread`` tokens of a row."""
    _count(ledger, part, model, config, rows, unread=unread, scored=0, trained=trained)


def _count(
    ledger: Ledger, part: str, model: str, config: LlamaConfig, rows: Rows, *, unread: int, scored: int, trained: bool
) -> None:
    longest = [(int(rows.lengths[batch].max()) - unread, len(batch)) for batch in length_batches(rows)]
    lengths = [length for length, count in longest for _ in range(count)]
    forwards = 3 if trained else 1
    ledger.count(part, model, tokens=sum(lengths), flops=forwards * forward_flops(config, lengths, scored))
