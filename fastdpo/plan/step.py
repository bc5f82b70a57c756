"""A training step on tensors that have shapes and no numbers, and what it would hold at its peak."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from fastdpo.logps.device_paths import is_portable
from fastdpo.model.attention import SEGMENTS, RowAttention
from fastdpo.model.head_calls import IGNORE_INDEX, Scoring
from fastdpo.model.head_layers import find_heads, swapped_forward
from fastdpo.model.language_model import described, language_model
from fastdpo.model.logit_transform import LogitTransform
from fastdpo.model.offloading import ActivationOffloading
from fastdpo.plan.layers import Repetition, mark_layers
from fastdpo.plan.models import make_policy, make_reference, placed
from fastdpo.plan.optimizers import state_bytes, step_bytes
from fastdpo.plan.setup import Setup
from fastdpo.plan.tracker import ELSEWHERE, MemoryTracker

# What our operations take up inside: of csrc/cuda/blocks.h, of portable_problem.py, and, on a CPU, for each thread
# blocks of 256 tokens and a part of the weight's gradient (csrc/cpu/fused.h, fused_backward.cpp).
_CUDA_WORKSPACE, _PORTABLE_WORKSPACE = 128 << 20, 256 << 20
_CPU_PORTABLE, _CPU_SUMS, _CPU_BLOCK = 48 << 20, 8 << 20, 256

# What oneDNN compiles for products in 16 bits, one kernel a shape, and keeps (ONEDNN_PRIMITIVE_CACHE_CAPACITY): as
# measured by bench/plan.py, where it is about the same for all models.
_ONEDNN_KERNELS = 40 << 20

_SCALE_ONLY = LogitTransform(scale=1.0, softcap=None)  # what models do to logits later takes no memory


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trace_step(
    setup: Setup, part: dict[str, Any], *, others: bool, repetition: Repetition | None = None
) -> dict[str, int]:
    """Part of memory -> bytes, at the moment of a training step at which all together are most.

    The run's own code runs: the model's forward, the attention over packed rows, the fused head, autograd, gradient
    checkpointing. Nothing is computed, and no memory is taken.

    Args:
        setup: the run.
        part: a micro-batch of :class:`fastdpo.model.row_collator.RowCollator`.
        others: the step has other micro-batches, so that gradients are there while this one's activations are.
        repetition: of the model's layers, where few of them shall be run in the place of all.

    Raises:
        NotImplementedError: the model cannot be run so; the message says why.
    """
    peak = None if repetition is None else _told_by_few(setup, part, others, repetition)
    return _trace(setup, part, others, None).peak if peak is None else peak


def _told_by_few(setup: Setup, part: dict[str, Any], others: bool, repetition: Repetition) -> dict[str, int] | None:
    try:
        small, large = (_trace(setup, part, others, size) for size in repetition.sizes)
        return repetition.peak(small, large)
    except Exception:  # of a model that counts its layers itself; if it is another error, all layers have it too
        return None


def _trace(setup: Setup, part: dict[str, Any], others: bool, layers: int | None) -> MemoryTracker:
    tracker = MemoryTracker(_workspace(setup))
    policy = make_policy(setup, layers)
    reference = make_reference(setup, layers) if setup.reference == "model" else None
    mark_layers(language_model(policy), tracker, "policy")
    if reference is not None:
        mark_layers(reference, tracker, "reference")
    # While indices have their values; of a row of its own, which makes its masks anew and keeps them.
    calls = list(_calls(copy.deepcopy(part)))
    with _without_numbers(), tracker:
        with tracker.labelled("weights"):
            placed(policy)
        if reference is not None:
            with tracker.labelled("reference"):
                placed(reference)
        trained = trained_parameters(policy)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: tracker.relabel(p.grad, "gradients"))
        kinds = [(parameter.shape, parameter.dtype) for parameter in trained]
        tracker.add("optimizer", state_bytes(setup.optim, kinds))
        tracker.add("workspace", _kernels(setup))
        if others:
            with tracker.labelled("gradients"):
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
        tracker.events.clear()  # nothing was given back yet, so that there is more from here on
        _micro_batch(setup, tracker, policy, reference, calls)
        tracker.for_a_moment("workspace", step_bytes(setup.optim, kinds, all_at_once=setup.device != "cpu"))
    return tracker


def count_parameters(setup: Setup) -> tuple[int, int]:
    """The numbers in the policy's parameters, and how many of them are trained."""
    parameters = list(make_policy(setup).parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@contextlib.contextmanager
def _without_numbers() -> Iterator[None]:
    # Indices are made with their values, and lose them where they meet a tensor that has none.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        yield


def _micro_batch(
    setup: Setup,
    tracker: MemoryTracker,
    policy: PreTrainedModel | PeftModel,
    reference: PreTrainedModel | None,
    calls: Sequence[Call],
) -> None:
    # The reference goes first, as in training.
    if reference is not None:
        with torch.no_grad():
            _score(setup, reference, calls, outputs=())
    elif setup.reference == "adapter":
        assert isinstance(policy, PeftModel)
        with torch.no_grad(), policy.disable_adapter():
            _score(setup, policy, calls, outputs=())
    with _offloaded(tracker, policy) if setup.offloading else contextlib.nullcontext():
        logps = _score(setup, policy, calls, outputs=setup.outputs)
        with _attending(policy, calls):  # layers run again in the backward
            logps.double().sum().backward()


def _score(setup: Setup, model: PreTrainedModel | PeftModel, calls: Sequence[Call], outputs: tuple[str, ...]) -> Tensor:
    """The log-probabilities of a micro-batch's targets, computed as a run computes them."""
    lm = language_model(model)
    parameters = inspect.signature(lm.forward).parameters
    found = []
    for call in calls:
        scoring = Scoring(
            name=described(lm),
            targets=_fake(call.targets),
            columns=_fake(call.columns),
            width=call.input_ids.shape[1],
            only_columns="logits_to_keep" in parameters,
            outputs=outputs,
            transform=_SCALE_ONLY,
            num_scored=call.num_scored,
        )
        kwargs = {name: _fake(value) if isinstance(value, Tensor) else value for name, value in call.kwargs.items()}
        if scoring.only_columns:
            kwargs["logits_to_keep"] = scoring.columns
        if "use_cache" in parameters:
            kwargs["use_cache"] = False
        with (
            _attending(model, calls),
            swapped_forward(find_heads(lm, scoring.name), _forward_of(scoring)),
            torch.autocast("cpu", setup.autocast, enabled=setup.autocast is not None),
        ):
            out = model(input_ids=_fake(call.input_ids), return_dict=True, **kwargs)
        found.append(scoring.logps_in(out.logits).flatten())
    return torch.cat(found)


class Call(NamedTuple):
    """A forward of the model: token ids [B, T], targets [B, K] at columns [K], and what else it is given."""

    input_ids: Tensor
    targets: Tensor
    columns: Tensor
    num_scored: int | None
    kwargs: dict[str, Any]


def _calls(part: dict[str, Any]) -> Iterator[Call]:
    """The forwards that a micro-batch is taken in, as :class:`fastdpo.model.scoring.Scorer` makes them."""
    if "row" in part:
        row = part["row"]
        kwargs = {"attention_mask": None, "position_ids": row.position_ids, SEGMENTS: row.segments}
        yield Call(row.input_ids, row.targets[None], row.scored, len(row.scored), kwargs)
        return
    labels = part["input_ids"].masked_fill(part["completion_mask"] == 0, IGNORE_INDEX)
    everything = [(torch.arange(len(labels)), labels.shape[1])]
    for rows, width in part.get("forwards", everything):
        targets = labels[rows, 1:width]
        mask = targets != IGNORE_INDEX
        columns = mask.any(0).nonzero().squeeze(1)
        kwargs = {"attention_mask": part["attention_mask"][rows, :width]}
        yield Call(part["input_ids"][rows, :width], targets[:, columns], columns, None, kwargs)


def _forward_of(scoring: Scoring) -> Callable[..., Tensor]:
    return lambda module, hidden: scoring(module, hidden)


def _fake(tensor: Tensor) -> Tensor:
    """As large, without its numbers."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _attending(model: PreTrainedModel | PeftModel, calls: Sequence[Call]) -> AbstractContextManager[None]:
    """The attention of packed rows in the model, where the calls are of these."""
    is_packed = SEGMENTS in calls[0].kwargs
    return RowAttention(model, "sdpa").active() if is_packed else contextlib.nullcontext()


def _offloaded(tracker: MemoryTracker, policy: PreTrainedModel | PeftModel) -> AbstractContextManager[None]:
    """The run's own offloading, to a memory that is not counted."""

    def copy(tensor: Tensor) -> Tensor:
        with tracker.labelled(ELSEWHERE):
            return tensor.clone()

    return ActivationOffloading(policy, torch.device("cpu"), copy).active()


def _kernels(setup: Setup) -> int:
    """What a library makes for products in 16 bits, and keeps."""
    halves = setup.autocast is not None or setup.dtype in (torch.bfloat16, torch.float16)
    return _ONEDNN_KERNELS if halves and setup.device == "cpu" and torch.backends.mkldnn.is_available() else 0


def _workspace(setup: Setup) -> int:
    if setup.device != "cpu":
        return _CUDA_WORKSPACE if setup.device == "cuda" else _PORTABLE_WORKSPACE
    if is_portable(torch.device("cpu")):
        return _CPU_PORTABLE
    width: int = setup.config.get_text_config().hidden_size
    return torch.get_num_threads() * (_CPU_SUMS + 3 * 4 * _CPU_BLOCK * width)
