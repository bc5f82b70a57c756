"""Puts ``token_logps`` where a Hugging Face causal language model has its output embedding.

The model runs its own forward, wrapped as it may be (DDP, FSDP, DeepSpeed, PEFT): only the output embedding's forward
is swapped, for one that scores the target tokens. The log-probabilities leave through the model's own outputs, where
the logits were, so every hook of every wrapper fires as it does for logits.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.logps.outputs import TokenLogps
from fastdpo.model.head_calls import IGNORE_INDEX, Probing, Scoring
from fastdpo.model.head_layers import find_heads, swapped_forward
from fastdpo.model.head_parts import HeadLayer
from fastdpo.model.language_model import cannot_run, described, language_model
from fastdpo.model.logit_transform import LogitTransform


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What the fused head says about one batch, or, of shape [K] in place of [B, T - 1], about one packed row.

    Attributes:
        logps: [B, T - 1], the log-probability of labels[:, 1:], in nats; 0 where ignored. float32, or float64 for a
            float64 model. Differentiable.
        mask: [B, T - 1] bool, where a label was scored.
        entropy, log_sum_sq_probs, mean_logits, is_top1: [B, T - 1], detached, 0 where ignored; None unless asked for.
            See :class:`fastdpo.logps.outputs.TokenLogps`.
        model_output: what the model returned beside its logits (``aux_loss`` of a mixture of experts, for one).
    """

    logps: Tensor
    mask: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None
    model_output: Any


class FusedHead:
    """A causal language model's log-probabilities without its logits.

    Calling this object runs the model with the fused output embedding, which is in place for that call alone: the
    model itself, for generation or for evaluation by others, is as it was.

        head = FusedHead(model)
        out = head(model, input_ids, attention_mask, labels)
        out.logps.sum(-1)

    Log-probabilities are those of the model's final logits: a scale or a softcap that the model applies after its
    output embedding is found out by sending a few values through it, at the first call or by :meth:`inspect`.

    Args:
        model: the bare model or the PEFT model, before DDP and the like are put around it. Not an encoder-decoder.
            LoRA on the output embedding itself is scored without putting its weight and the adapter's together.

    Raises:
        TypeError: ``model`` is neither a ``PreTrainedModel`` nor a ``PeftModel``.
        NotImplementedError: the model is not supported; the message names its type and the reason.

    Not for several threads at once.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        if not isinstance(model, (PreTrainedModel, PeftModel)):
            raise TypeError(f"model is a {type(model).__name__}; it should be a PreTrainedModel or a PeftModel")
        if isinstance(model, PeftModel) and any(c.is_prompt_learning for c in model.peft_config.values()):
            raise NotImplementedError(
                "the model has a PEFT prompt-learning adapter (prompt tuning, prefix tuning, p-tuning), which puts "
                "virtual tokens before the text; use an adapter on weights, such as LoRA"
            )
        self._lm = language_model(model)
        self._name = described(self._lm)
        if self._lm.config.is_encoder_decoder:
            raise NotImplementedError(f"{self._name} is an encoder-decoder; only causal language models are supported")
        parameters = inspect.signature(self._lm.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._has_logits_to_keep = "logits_to_keep" in parameters
        self._has_use_cache = takes_any or "use_cache" in parameters
        self._heads = find_heads(self._lm, self._name)
        self._armed: Scoring | Probing | None = None
        self._transform: LogitTransform | None = None
        # Made once, so that whoever compares functions (torch.compile) finds the same one at every call.
        self._forward = self._make_forward()

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        *,
        outputs: Sequence[str] = (),
        **model_kwargs: Any,
    ) -> HeadOutput:
        """Score ``labels`` with one forward of ``model``.

        Args:
            model: the root module, with whatever is wrapped around the model that the head was made for.
            input_ids: [B, T] int64.
            attention_mask: [B, T], or None.
            labels: [B, T] int64, as for the model's own loss: not shifted, -100 where nothing is to be scored.
            outputs: other fields of :class:`HeadOutput` to compute.
            model_kwargs: passed on to ``model``.

        Raises:
            ValueError: shapes do not fit.
            NotImplementedError: the model does to its logits what cannot be expressed by a scale and a softcap, or
                does not call its output embedding as expected.
        """
        if labels.shape != input_ids.shape or input_ids.dim() != 2:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)}; both should be [B, T]"
            )
        targets = labels[:, 1:]
        mask = targets != IGNORE_INDEX
        # An index takes the same columns from every row: those in which any row has a target. The rest of the
        # ignored targets is dropped by token_logps.
        columns = mask.any(0).nonzero().squeeze(1)
        logps, result, model_output = self._score_columns(
            model, input_ids, attention_mask, targets[:, columns], columns, outputs, None, model_kwargs
        )

        def spread(values: Tensor) -> Tensor:
            return values.new_zeros(targets.shape).index_copy(1, columns, values)

        return _lay_out(spread, logps, mask, result, model_output)

    def score_row(
        self,
        model: nn.Module,
        input_ids: Tensor,
        scored: Tensor,
        targets: Tensor,
        *,
        outputs: Sequence[str] = (),
        **model_kwargs: Any,
    ) -> HeadOutput:
        """Score chosen positions of one packed row with one forward of ``model``, which gets no attention mask.

        Args:
            model: as in a call of this object.
            input_ids: [1, N] int64.
            scored: [K] int64, positions of the row. One may be named several times: a prompt's last token predicts the
                first token of every completion.
            targets: [K] int64, what each of them predicts.
            outputs: as in a call of this object.
            model_kwargs: passed on to ``model``: ``position_ids``, and what its attention needs.

        Returns:
            :class:`HeadOutput`, fields of shape [K].

        Raises:
            ValueError, NotImplementedError: as a call of this object.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != 1:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it should be [1, N], one packed row")
        if scored.dim() != 1 or targets.shape != scored.shape:
            raise ValueError(
                f"scored has shape {tuple(scored.shape)} and targets {tuple(targets.shape)}; both should be [K]"
            )
        logps, result, model_output = self._score_columns(
            model, input_ids, None, targets[None], scored, outputs, len(scored), model_kwargs
        )
        mask = torch.ones_like(targets, dtype=torch.bool)
        return _lay_out(lambda values: values.squeeze(0), logps, mask, result, model_output)

    def score_columns(
        self,
        model: nn.Module,
        input_ids: Tensor,
        targets: Tensor,
        columns: Tensor,
        outputs: Sequence[str] = (),
        **model_kwargs: Any,
    ) -> HeadOutput:
        """Score some columns of rows with one forward of ``model``, which gets no attention mask.

        Args:
            model: as in a call of this object.
            input_ids: [B, T] int64.
            targets: [B, K] int64, what is predicted there, -100 for nothing.
            columns: [K] int64, of ``input_ids``.
            outputs, model_kwargs: as in a call of this object.

        Returns:
            :class:`HeadOutput`, fields of shape [B, K].

        Raises:
            NotImplementedError: as a call of this object.
        """
        logps, result, model_output = self._score_columns(
            model, input_ids, None, targets, columns, outputs, None, model_kwargs
        )
        return _lay_out(lambda values: values, logps, targets != IGNORE_INDEX, result, model_output)

    def _score_columns(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        targets: Tensor,
        columns: Tensor,
        outputs: Sequence[str],
        num_scored: int | None,
        model_kwargs: dict[str, Any],
    ) -> tuple[Tensor, TokenLogps, Any]:
        """The log-probabilities [B, K] of targets [B, K] at columns [K], the head's result, and the model's."""
        if isinstance(model, nn.DataParallel):
            raise NotImplementedError("nn.DataParallel is not supported; start one process per device (torchrun)")
        self.inspect_once(model)
        assert self._transform is not None
        scoring = Scoring(
            name=self._name,
            targets=targets,
            columns=columns,
            width=input_ids.shape[1],
            only_columns=self._has_logits_to_keep,
            outputs=tuple(outputs),
            transform=self._transform,
            num_scored=num_scored,
        )
        if self._has_logits_to_keep:
            model_kwargs = {**model_kwargs, "logits_to_keep": columns}
        with self._arm(scoring):
            model_output = self._run(model, input_ids, attention_mask, **model_kwargs)
        if scoring.result is None:
            raise self._not_called()
        logps = scoring.logps_in(model_output.logits)
        model_output.logits = None
        return logps, scoring.result, model_output

    def check_width(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, **model_kwargs: Any
    ) -> None:
        """See, by one forward, that every token of ``input_ids`` [B, T] has its own hidden state, and nothing else has.

        Some models put the hidden states of images before those of the text, and a column is another one then.

        Raises:
            NotImplementedError: it is not so.
        """
        self.inspect_once(model)
        assert self._transform is not None
        first = input_ids.new_zeros(1)
        scoring = Scoring(
            name=self._name,
            targets=torch.full_like(input_ids[:, :1], IGNORE_INDEX),
            columns=first,
            width=input_ids.shape[1],
            only_columns=False,
            outputs=(),
            transform=self._transform,
        )
        with self._arm(scoring):
            self._run(model, input_ids, attention_mask, **model_kwargs)

    @property
    def lm(self) -> PreTrainedModel:
        """The language model that the head was made for."""
        return self._lm

    def inspect(self, model: nn.Module) -> None:
        """Find out what the model does to its logits after the output embedding, with a forward of two tokens.

        Called by the first scoring call; call it earlier to have errors earlier. Random number generators are left
        as they were.

        Raises:
            NotImplementedError: it is not a scale and a softcap, the same for every vocabulary entry; or the model
                cannot be run on tokens alone.
        """
        device = self._heads[0].weight.device
        probing = Probing(self._name)
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            self._arm(probing),
        ):
            ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
            try:
                logits = self._run(model, ids, torch.ones_like(ids)).logits
            except (torch.OutOfMemoryError, NotImplementedError):
                raise
            except Exception as error:
                mode = "training" if model.training else "evaluation"
                raise cannot_run(self._lm, f"on two tokens in {mode} mode", error) from error
        if probing.sent is None:
            raise self._not_called()
        self._transform = probing.transform_in(logits)

    def inspect_once(self, model: nn.Module) -> None:
        """:meth:`inspect`, unless that was done."""
        if self._transform is None:
            self.inspect(model)

    def _run(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, **model_kwargs: Any) -> Any:
        if self._has_use_cache:
            model_kwargs.setdefault("use_cache", False)
        return model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **model_kwargs)

    @contextlib.contextmanager
    def _arm(self, call: Scoring | Probing) -> Iterator[None]:
        """Put our forward into the output embedding, and take it out again."""
        self._armed = call
        try:
            with swapped_forward(self._heads, self._forward):
                yield
        finally:
            self._armed = None

    def _make_forward(self) -> Callable[..., Tensor]:
        def forward(module: HeadLayer, hidden: Tensor, **kwargs: Any) -> Tensor:
            if kwargs:
                raise NotImplementedError(
                    f"the output embedding of {self._name} is called with {', '.join(kwargs)}, which is not supported"
                )
            assert self._armed is not None, "our forward stands in the layer during our calls alone"
            return self._armed(module, hidden)

        return forward

    def _not_called(self) -> NotImplementedError:
        return NotImplementedError(
            f"{self._name} did not call its output embedding ({type(self._lm.get_output_embeddings()).__name__}) in "
            "its forward, so the logits come from elsewhere (a patched forward, such as Liger's, or a weight that is "
            "used without its module). It is not supported"
        )


def _lay_out(
    place: Callable[[Tensor], Tensor], logps: Tensor, mask: Tensor, result: TokenLogps, model_output: Any
) -> HeadOutput:
    """What was scored, each field of it put where the caller expects it."""

    def placed(values: Tensor | None) -> Tensor | None:
        return None if values is None else place(values)

    return HeadOutput(
        logps=place(logps),
        mask=mask,
        entropy=placed(result.entropy),
        log_sum_sq_probs=placed(result.log_sum_sq_probs),
        mean_logits=placed(result.mean_logits),
        is_top1=placed(result.is_top1),
        model_output=model_output,
    )
