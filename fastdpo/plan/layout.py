"""How a run's batches will be laid out, as far as that can be told before its weights are there."""

from __future__ import annotations

from dataclasses import replace

from fastdpo.model.language_model import language_model
from fastdpo.model.load_balancing import calls_known_function
from fastdpo.model.packing import LAYOUTS
from fastdpo.model.recurrent import stateful_kinds
from fastdpo.model.router_loss import may_have_router_loss, router_loss_coef
from fastdpo.plan.batches import largest_part, made_up_rows, make_collator
from fastdpo.plan.models import make_policy
from fastdpo.plan.setup import Setup
from fastdpo.plan.step import trace_step


def has_own_aux_loss(setup: Setup, coefficient: float | None) -> bool:
    """Whether the loss will have a load-balancing term that the model computes in a way of its own.

    Args:
        setup: the run.
        coefficient: of the term, what the run asks for, or None.
    """
    lm = language_model(make_policy(replace(setup, checkpointing=False)))
    if not may_have_router_loss(lm) or calls_known_function(lm):
        return False
    return bool(router_loss_coef(lm) if coefficient is None else coefficient)


def layout_of(setup: Setup, packing: str, obstacles: dict[str, str | None]) -> str:
    """The layout that such a run will choose; whether results are right in it, the run looks at by itself.

    Args:
        setup: the run.
        packing: what it asks for: see :data:`fastdpo.model.packing.PACKINGS`.
        obstacles: of :func:`fastdpo.model.packing_choice.obstacles_in`.

    Raises:
        NotImplementedError: the model cannot be run at all.
    """
    if packing != "auto":
        return packing
    small = replace(setup, checkpointing=False, reference="none")
    if stateful_kinds(language_model(make_policy(small))):
        return "padded"
    for layout in LAYOUTS[:-1]:
        if obstacles.get(layout) is not None:
            continue
        collator = make_collator(
            layout, setup.device, max_tokens=None, max_length=None, truncation_mode="keep_start", multiple=None
        )
        part, _ = largest_part(collator, made_up_rows(4, 4, 1, 8))
        try:
            trace_step(small, part, others=False)
        except NotImplementedError:
            continue
        return layout
    return "padded"
