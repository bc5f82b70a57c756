"""What a user of fastdpo gets with each causal language model class of transformers, found by running it tiny."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from family_truth import alone, laid_out, made_up_rows
from kernels_in_torch import install_kernels
from tiny_families import NOT_MADE, make_family
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastdpo.model.head import FusedHead
from fastdpo.model.model_check import check_causal
from fastdpo.model.packing_choice import Packing, choose_packing, obstacles_in
from fastdpo.model.padding_check import dependence_on_padding
from fastdpo.model.randomness import disable_dropout, randomness_left
from fastdpo.model.recurrent import stateful_kinds
from fastdpo.model.router_loss import has_router_loss, is_loss_of_tokens, router_loss_coef
from fastdpo.model.scoring import Scorer

CPU = torch.device("cpu")
# Of packed rows, in bfloat16: how far from the truth they are beside padded ones.
MOST_TIMES = 1.2


@dataclass(frozen=True)
class Family:
    """A row of the table in docs/models.md; each field is a cell.

    Attributes:
        model_type: as configurations have it.
        name: the class.
        trains: ``yes``, or why not.
        layout: of batches; ``—`` where it does not train.
        why: a layout with less work was not chosen.
        gradients: whether those of the fused head, in the layout, are those of whole logits in padded rows.
        bf16: whether packed rows are as near to the truth as padded ones; ``padded`` where these are used.
        aux_loss: whether the model gives a load-balancing loss.
        checkpointing: whether it has gradient checkpointing.
        resume: of :func:`family_resume.resume`: whether a run that goes on from a checkpoint is one that was never
            stopped.
        notes: what else a run says.
    """

    model_type: str
    name: str
    trains: str
    layout: str = "—"
    why: str = ""
    gradients: str = "—"
    bf16: str = "—"
    aux_loss: str = "—"
    checkpointing: str = "—"
    resume: str = "—"
    notes: str = ""


def survey(model_type: str) -> Family:
    """Looks at the family as a run of the trainer does, and then at its gradients and its rounding; not at resume."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    refused = partial(Family, model_type, name)
    if model_type in NOT_MADE:
        return refused(f"not tried: {NOT_MADE[model_type]}")
    model = make_family(model_type, trained=True)
    try:
        scorer = scorer_of(model)
        scorer.head.inspect(model)
        disable_dropout(model)
        check_causal(scorer, CPU, model.dtype)
        noise = randomness_left(scorer, CPU)
    except NotImplementedError as error:
        return refused(f"refused: {short(str(error))}")
    has_loss = has_router_loss(scorer, CPU)
    counts = has_loss and router_loss_coef(model) > 0
    packing = _packing_of(scorer, has_own_aux_loss=counts and not is_loss_of_tokens(scorer, CPU))
    notes = ["random in evaluation, too"] if noise else []
    notes += _with_kernels(model, packing)
    if dependence_on_padding(scorer, 1024, CPU, model.dtype):
        notes.append("a sequence's log-probability depends on its padding")
    return Family(
        model_type,
        name,
        "yes",
        layout=packing.layout,
        why="; ".join(dict.fromkeys(short(reason) for reason in packing.reasons)),
        gradients="equal" if gradient_error(model, packing) < 1e-3 else "differ",
        bf16=_bf16(model_type, packing),
        aux_loss="yes" if has_loss else "none",
        checkpointing="yes" if model.supports_gradient_checkpointing else "none",
        notes="; ".join(notes),
    )


def _packing_of(scorer: Scorer, *, has_own_aux_loss: bool) -> Packing:
    return choose_packing(
        "auto",
        [scorer],
        obstacles=obstacles_in(
            has_own_collator=False,
            pad_to_multiple_of=None,
            torch_compile=False,
            has_own_aux_loss=has_own_aux_loss,
            has_dropout=False,
        ),
        max_length=1024,
        device=CPU,
    )


def _with_kernels(model: PreTrainedModel, packing: Packing) -> list[str]:
    """What the layout is where the packages are whose kernels keep sequences apart, where that is another."""
    if packing.layout != "padded" or not stateful_kinds(model):
        return []
    with pytest.MonkeyPatch.context() as patch:
        packages = install_kernels(patch, model)
        layout = _packing_of(scorer_of(model), has_own_aux_loss=False).layout
    return [f"{layout} with the kernels of {', '.join(packages)}"] if layout != packing.layout else []


def scorer_of(model: PreTrainedModel) -> Scorer:
    return Scorer(model, model, FusedHead(model))


def short(reason: str) -> str:
    """A reason without the model's name, and without figures, which are a machine's."""
    reason = re.sub(r"\w+ \(model_type '[\w-]+'\) ?", "", reason)
    if "does not go through transformers' attention interface" in reason:
        return "attention code of its own"
    if "output embedding" in reason:
        return "its output embedding is none that is supported"
    if "load-balancing loss" in reason:
        return "its load-balancing loss"
    if "drafts for another model" in reason:
        return "drafts for another model"
    if "carry their state from one sequence" in reason:
        return "needs kernels to keep sequences apart"
    if "carry a state from one sequence" in reason:
        return "carries a state from one sequence into the next"
    if "cannot be run" in reason and "pixel_values" in reason:
        return "cannot be run without an image"
    if "mm_token_type_ids" in reason:
        return "is not trained without mm_token_type_ids, which text alone has not"
    if "does not bring it back (missing" in reason:
        return "what transformers saves of it does not bring it back"
    if "cannot be run" in reason:
        return "cannot be trained in this version of transformers"
    for words in ("computes something else in packed rows", "sees the future", "lets one completion depend on another"):
        if words in reason:
            helps = re.search(r"Load it with (.*?) \(", reason)
            return f"{words}; `{helps[1]}` helps" if helps else words
    return re.sub(r"\d+ tokens", "some tokens", reason).split(":")[0].strip().removesuffix(".")


def gradient_error(model: PreTrainedModel, packing: Packing) -> float:
    """How far gradients by the fused head, in the layout, are from those of whole logits in padded rows: the largest
    share of a parameter's largest gradient."""
    rows = made_up_rows(1, ((7, 5, 4), (1, 3, 6)))
    weights = [torch.linspace(0.5, 1.5, len(row[side])) for side in ("chosen_ids", "rejected_ids") for row in rows]

    def gradients(found: list[Tensor], of: PreTrainedModel) -> dict[str, Tensor]:
        # A position that has no token before it is predicted by none.
        sum((values * weight[-len(values) :]).sum() for values, weight in zip(found, weights, strict=True)).backward()
        return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}

    whole, fused = copy.deepcopy(model), copy.deepcopy(model)
    true = gradients(alone(whole, rows, differentiable=True), whole)
    scorer = scorer_of(fused)
    ours = gradients(laid_out(scorer, packing.layout, packing.backend, rows, differentiable=True), fused)
    largest = max(float(x.abs().max()) for x in true.values())
    missing = [x for name, x in true.items() if name not in ours and float(x.abs().max()) > 0]
    errors = [
        float((ours[name] - x).abs().max()) / (float(x.abs().max()) + 1e-3 * largest)
        for name, x in true.items()
        if name in ours
    ]
    return float("inf") if missing else max(errors)


def _bf16(model_type: str, packing: Packing) -> str:
    if packing.layout == "padded":
        return "padded"
    packed, padded = bf16_errors(model_type, packing, trained=True)
    return "yes" if packed <= MOST_TIMES * padded else f"less exact, {packed / padded:.1f} ×"


def bf16_errors(model_type: str, packing: Packing, **options: Any) -> tuple[float, float]:
    """How far a model in bfloat16 is from its own weights in the widest type, in packed rows and in padded ones: the
    roots of the mean squares over tokens, in nats."""
    rows = made_up_rows()
    narrow = make_family(model_type, dtype=torch.bfloat16, **options)
    wide, true = truth(model_type, rows, weights=narrow, **options)
    del wide
    scorer = scorer_of(narrow)

    def error(layout: str, backend: str | None) -> float:
        found = laid_out(scorer, layout, backend, rows)
        return float(torch.cat([a.double() - b for a, b in zip(found, true, strict=True)]).square().mean().sqrt())

    return error(packing.layout, packing.backend), error("padded", None)


def truth(
    model_type: str, rows: list[dict[str, list[int]]], weights: PreTrainedModel | None = None, **options: Any
) -> tuple[PreTrainedModel, list[Tensor]]:
    """The model in float64, or in float32 where parts of it have no other, and its log-probabilities."""
    for dtype in (torch.float64, torch.float32):
        model = make_family(model_type, dtype=dtype, **options)
        if weights is not None:
            model.load_state_dict(weights.state_dict())
        try:
            return model, alone(model, rows)
        except RuntimeError:
            if dtype == torch.float32:
                raise
    raise AssertionError("one of the two returns or raises")
