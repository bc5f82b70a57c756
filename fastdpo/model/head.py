"""Puts ``token_logps`` where a Hugging Face causal language model has its output embedding.

The model runs its own forward, wrapped as it may be (DDP, FSDP, DeepSpeed, PEFT): only the output embedding's forward
is swapped, for one that scores the target tokens. The log-probabilities leave through the model's own outputs, where
the logits were, so every hook of every wrapper fires as it does for logits.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastdpo.logps.outputs import TokenLogps
from fastdpo.logps.primitive import token_logps
from fastdpo.model.head_adapters import LoraLinear, active_updates, why_not_supported

IGNORE_INDEX = -100

# Log-probabilities leave the head times this. What models do to logits afterwards (a scale, a softcap) is then linear
# to within (100 * 2^-24)^2, and dividing by its slope undoes it; a power of two costs no precision.
_SHRINK = 2.0**-24

# Sent through what follows the output embedding, to learn what it does: the first gives the slope at 0, the second
# the level at which it saturates, and all of them must agree with a scale and a softcap.
_PROBES = (2.0**-12, 2.0**40, 0.5, -0.5, 4.0, -4.0, 60.0, -60.0)
_PROBE_TOLERANCE = 1e-5  # float32, through at most a division, a tanh and a product

_HOW_NOT_TO_QUANTIZE = (
    ". Leave it out when the model is quantised: by default BitsAndBytesConfig does; where llm_int8_skip_modules is "
    "given, that must name it"
)


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What the fused head says about one batch, or, of shape [K] in place of [B, T - 1], about one packed row.

    Attributes:
        logps: [B, T - 1], the log-probability of labels[:, 1:], in nats; 0 where ignored. float32, or float64 for a
            float64 model. Differentiable.
        mask: [B, T - 1] bool, where a label was scored.
        entropy, log_sum_sq_probs, mean_logits, is_top1: [B, T - 1], detached, 0 where ignored; None unless asked for.
            See :class:`fastdpo.outputs.TokenLogps`.
        model_output: what the model returned beside its logits (``aux_loss`` of a mixture of experts, for one).
    """

    logps: Tensor
    mask: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None
    model_output: Any


@dataclass(frozen=True, slots=True)
class _LogitTransform:
    """What the model does to its logits after the output embedding: softcap * tanh(scale * z / softcap)."""

    scale: float
    softcap: float | None


@dataclass(slots=True)
class _Scoring:
    """One armed call: what the swapped forward is to score, and the results that do not pass through the model."""

    targets: Tensor  # [B, K]
    columns: Tensor  # [K], of the hidden states
    width: int  # T
    outputs: tuple[str, ...]
    transform: _LogitTransform
    num_scored: int | None = None
    result: TokenLogps | None = None


@dataclass(slots=True)
class _Probing:
    """One armed call that asks what happens to logits after the output embedding."""

    sent: Tensor | None = None


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
        self._lm = model.get_base_model() if isinstance(model, PeftModel) else model
        self._name = f"{type(self._lm).__name__} (model_type {self._lm.config.model_type!r})"
        if self._lm.config.is_encoder_decoder:
            raise NotImplementedError(f"{self._name} is an encoder-decoder; only causal language models are supported")
        parameters = inspect.signature(self._lm.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._has_logits_to_keep = "logits_to_keep" in parameters
        self._has_use_cache = takes_any or "use_cache" in parameters
        self._heads = self._find_heads()
        self._armed: _Scoring | _Probing | None = None
        self._transform: _LogitTransform | None = None
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

        def spread(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.new_zeros(targets.shape).index_copy(1, columns, values)

        return HeadOutput(
            logps=spread(logps),
            mask=mask,
            entropy=spread(result.entropy),
            log_sum_sq_probs=spread(result.log_sum_sq_probs),
            mean_logits=spread(result.mean_logits),
            is_top1=spread(result.is_top1),
            model_output=model_output,
        )

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

        def flat(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.squeeze(0)

        return HeadOutput(
            logps=logps.squeeze(0),
            mask=torch.ones_like(targets, dtype=torch.bool),
            entropy=flat(result.entropy),
            log_sum_sq_probs=flat(result.log_sum_sq_probs),
            mean_logits=flat(result.mean_logits),
            is_top1=flat(result.is_top1),
            model_output=model_output,
        )

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
        scoring = _Scoring(targets, columns, input_ids.shape[1], tuple(outputs), self._transform, num_scored)
        if self._has_logits_to_keep:
            model_kwargs = {**model_kwargs, "logits_to_keep": columns}
        with self._arm(scoring):
            model_output = self._run(model, input_ids, attention_mask, **model_kwargs)
        if scoring.result is None:
            raise self._not_called()
        shrunk = model_output.logits
        if shrunk.shape != (*targets.shape, 1) or shrunk.dtype != scoring.result.logps.dtype:
            raise NotImplementedError(
                f"{self._name} turned the log-probabilities from {scoring.result.logps.dtype} of shape "
                f"{(*targets.shape, 1)} into {shrunk.dtype} of shape {tuple(shrunk.shape)} on their way out"
            )
        model_output.logits = None
        return shrunk.squeeze(-1) * (1 / (_SHRINK * self._transform.scale)), scoring.result, model_output

    def inspect(self, model: nn.Module) -> None:
        """Find out what the model does to its logits after the output embedding, with a forward of two tokens.

        Called by the first scoring call; call it earlier to have errors earlier. Random number generators are left
        as they were.

        Raises:
            NotImplementedError: it is not a scale and a softcap, the same for every vocabulary entry.
        """
        device = self._heads[0].weight.device
        probing = _Probing()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            self._arm(probing),
        ):
            ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
            logits = self._run(model, ids, torch.ones_like(ids)).logits
        if probing.sent is None:
            raise self._not_called()
        self._transform = self._fit(probing.sent.flatten(), logits.flatten())

    def inspect_once(self, model: nn.Module) -> None:
        """:meth:`inspect`, unless that was done."""
        if self._transform is None:
            self.inspect(model)

    def _run(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, **model_kwargs: Any) -> Any:
        if self._has_use_cache:
            model_kwargs.setdefault("use_cache", False)
        return model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **model_kwargs)

    @contextlib.contextmanager
    def _arm(self, call: _Scoring | _Probing) -> Iterator[None]:
        """Put our forward into the output embedding, and take it out again."""
        self._armed = call
        slots = [(head, _forward_slot(head)) for head in self._heads]
        before = [vars(head).get(slot) for head, slot in slots]
        for head, slot in slots:
            setattr(head, slot, types.MethodType(self._forward, head))
        try:
            yield
        finally:
            self._armed = None
            for (head, slot), own in zip(slots, before, strict=True):
                if own is None:
                    delattr(head, slot)
                else:
                    setattr(head, slot, own)

    # ----------------------------------------------------------------------------------------------------------------
    # The output embedding
    # ----------------------------------------------------------------------------------------------------------------

    def _find_heads(self) -> list[nn.Linear | LoraLinear]:
        """The layers that may be called as output embedding: several where PEFT keeps a trained copy."""
        embedding = self._lm.get_output_embeddings()
        if embedding is None:
            raise NotImplementedError(f"{self._name} has no output embedding (get_output_embeddings() gives None)")
        if isinstance(embedding, ModulesToSaveWrapper):
            heads = [embedding.original_module, *embedding.modules_to_save.values()]
        else:
            heads = [embedding]
        for head in heads:
            kind = f"{type(head).__module__}.{type(head).__name__}"
            if type(head).__module__.startswith("peft."):
                self._check_adapter(head)
            elif type(head).forward is not nn.Linear.forward:
                raise NotImplementedError(
                    f"the output embedding of {self._name} is a {kind}; only nn.Linear is supported"
                    f"{_HOW_NOT_TO_QUANTIZE if _is_quantized(head) else ''}"
                )
            if "forward" in vars(head) and _forward_slot(head) == "forward":
                raise NotImplementedError(
                    f"the forward of the output embedding of {self._name} was replaced already, by "
                    f"{head.forward!r}; remove that first"
                )
        return heads

    def _check_adapter(self, head: nn.Module) -> None:
        reason = why_not_supported(head)
        if reason is not None:
            raise NotImplementedError(
                f"{self._name} has a PEFT adapter on its output embedding ({type(head).__module__}."
                f"{type(head).__name__}), {reason}: take it out of target_modules, or name it in modules_to_save to "
                "train it whole"
            )

    def _make_forward(self) -> Callable[[nn.Linear | LoraLinear, Tensor], Tensor]:
        def forward(module: nn.Linear | LoraLinear, hidden: Tensor, **kwargs: Any) -> Tensor:
            if kwargs:
                raise NotImplementedError(
                    f"the output embedding of {self._name} is called with {', '.join(kwargs)}, which is not supported"
                )
            if isinstance(self._armed, _Probing):
                return self._send_probes(module, self._armed)
            return self._score(module, hidden, self._armed)

        return forward

    def _score(self, head: nn.Linear | LoraLinear, hidden: Tensor, scoring: _Scoring) -> Tensor:
        """[B, K, H] or [B, T, H] to [B, K, 1]: log-probabilities, shrunk to where any transform is linear."""
        if scoring.result is not None:
            raise NotImplementedError(f"{self._name} calls its output embedding more than once in a forward")
        for parameter in head.parameters():
            if isinstance(parameter, DTensor):
                raise NotImplementedError(
                    f"the output embedding of {self._name} is sharded ({parameter.placements}) inside its own "
                    "forward; tensor parallelism is not supported"
                )
        batch, kept = scoring.targets.shape
        expected = kept if self._has_logits_to_keep else scoring.width
        if hidden.shape[:-1] != (batch, expected):
            raise NotImplementedError(
                f"{self._name} gives its output embedding a tensor of shape {tuple(hidden.shape)}, where "
                f"({batch}, {expected}, {head.in_features}) was expected"
            )
        if not self._has_logits_to_keep:
            hidden = hidden[:, scoring.columns]
        updates = ()
        if isinstance(head, LoraLinear):
            self._check_adapter(head)  # another adapter may have come since
            updates = active_updates(head, hidden)
        scoring.result = token_logps(
            hidden,
            head.weight,
            scoring.targets,
            head.bias,
            ignore_index=IGNORE_INDEX,
            logit_scale=scoring.transform.scale,
            softcap=scoring.transform.softcap,
            outputs=scoring.outputs,
            num_scored=scoring.num_scored,
            low_rank=updates,
        )
        # Not a view: FSDP2 warns of those, whose hooks are lost where a model writes into its logits.
        return scoring.result.logps.unsqueeze(-1) * _SHRINK

    # ----------------------------------------------------------------------------------------------------------------
    # What the model does to its logits
    # ----------------------------------------------------------------------------------------------------------------

    def _send_probes(self, head: nn.Linear | LoraLinear, probing: _Probing) -> Tensor:
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        positions = math.ceil(len(_PROBES) / head.out_features)  # more than one where entries are fewer than probes
        index = torch.arange(positions * head.out_features, device=head.weight.device) % len(_PROBES)
        probing.sent = torch.tensor(_PROBES, dtype=dtype, device=index.device)[index]
        # A clone: some models write into their logits.
        return probing.sent.clone().view(1, positions, head.out_features)

    def _fit(self, sent: Tensor, received: Tensor) -> _LogitTransform:
        if sent.shape != received.shape:
            raise NotImplementedError(
                f"{self._name} turns its {sent.numel()} logits into {received.numel()}, which is not supported"
            )
        by_probe = [received[i :: len(_PROBES)].double() for i in range(len(_PROBES))]
        measured = [values[0].item() for values in by_probe]
        same_everywhere = all(bool((values == values[0]).all()) for values in by_probe)
        scale = measured[0] / _PROBES[0]
        if abs(scale - 1) < _PROBE_TOLERANCE:
            scale = 1.0  # a softcap alone leaves rounding errors
        saturated = abs(measured[1] - scale * _PROBES[1]) > _PROBE_TOLERANCE * scale * _PROBES[1]
        transform = _LogitTransform(scale, measured[1] if saturated else None)
        expected = [_apply(transform, x) for x in _PROBES]
        # Written so that NaN does not fit.
        fits = all(abs(m - e) <= _PROBE_TOLERANCE * abs(e) for m, e in zip(measured, expected, strict=True))
        if not (same_everywhere and fits and scale > 0):
            if same_everywhere:
                found = ", ".join(f"{x:g} becomes {m:g}" for x, m in zip(_PROBES, measured, strict=True))
            else:
                found = "the same value becomes different ones at different vocabulary entries"
            raise NotImplementedError(
                f"what {self._name} does to its logits after the output embedding is not a positive scale, nor a "
                f"softcap (softcap * tanh(scale * logit / softcap)), nor both: {found}. It is not supported"
            )
        return transform

    def _not_called(self) -> NotImplementedError:
        return NotImplementedError(
            f"{self._name} did not call its output embedding ({type(self._lm.get_output_embeddings()).__name__}) in "
            "its forward, so the logits come from elsewhere (a patched forward, such as Liger's, or a weight that is "
            "used without its module). It is not supported"
        )


def _apply(transform: _LogitTransform, logit: float) -> float:
    z = logit * transform.scale
    return z if transform.softcap is None else transform.softcap * math.tanh(z / transform.softcap)


def _is_quantized(head: nn.Module) -> bool:
    return type(head).__module__.startswith("bitsandbytes.")


def _forward_slot(head: nn.Module) -> str:
    """accelerate's device hooks keep a module's own forward under another name, and call it from theirs."""
    return "_old_forward" if hasattr(head, "_hf_hook") else "forward"
