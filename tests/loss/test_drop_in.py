"""The numbers of TRL's DPOTrainer: its own _compute_loss, given the same tokens' log-probabilities, float32."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loss_batches import Batch, make_batch
from torch import Tensor
from trl import DPOTrainer

from fastdpo import TokenLogps, dpo_loss, preference_loss

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
DIFFERENT = 1e-4
OUTPUTS = ("entropy", "mean_logits", "is_top1")

# TRL's losses and options, and what ours are called where that is something else.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"loss_type": "sigmoid"}, {}),
    ({"loss_type": "hinge"}, {}),
    ({"loss_type": "ipo"}, {}),
    ({"loss_type": "exo_pair", "label_smoothing": 1e-3}, {}),
    ({"loss_type": "nca_pair"}, {}),
    ({"loss_type": "robust", "label_smoothing": 0.1}, {}),
    ({"loss_type": "bco_pair"}, {}),
    ({"loss_type": "sppo_hard"}, {}),
    ({"loss_type": "aot"}, {}),
    ({"loss_type": "aot", "label_smoothing": 0.2}, {}),
    ({"loss_type": "aot_unpaired", "label_smoothing": 0.2}, {}),
    ({"loss_type": "apo_zero"}, {}),
    ({"loss_type": "apo_down"}, {}),
    ({"loss_type": "discopop"}, {}),
    ({"loss_type": "discopop", "discopop_tau": 0.5}, {}),
    ({"loss_type": "sigmoid_norm"}, {}),
    # TRL's likelihood is the mean over the tokens of the batch.
    ({"loss_type": "sft"}, {"sft_reduction": "batch"}),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {"sft_reduction": "batch"}),
    ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, {"sft_reduction": "batch"}),
    # TRL's sigmoid ignores label_smoothing: cDPO is ours alone, and a mix's loss without it is TRL's.
    ({"loss_type": ["hinge", "robust"], "loss_weights": [0.5, 2.0], "label_smoothing": 0.1}, {}),
    *(
        ({"loss_type": name, "f_divergence_type": kind} | ({"label_smoothing": 0.1} if name == "exo_pair" else {}), {})
        for name in ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
    ({"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2}, {}),
    ({"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, {}),
    ({"loss_type": "sigmoid", "ld_alpha": 0.4}, {}),
    ({"loss_type": "bco_pair", "ld_alpha": 0.0}, {}),
    ({"loss_type": "sigmoid", "use_weighting": True}, {}),
    ({"loss_type": ["apo_zero", "nca_pair"], "use_weighting": True}, {}),
]
IDS = ["-".join(f"{value}" for value in theirs.values()) for theirs, _ in CASES]


class TheirModel(torch.nn.Module):
    """Returns what TRL's fused head would: by position, what the token after it has."""

    is_gradient_checkpointing = False

    def __init__(self, outputs: TokenLogps) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, **_: Any) -> SimpleNamespace:
        fields = {name: getattr(self.outputs, name) for name in (*OUTPUTS, "log_sum_sq_probs")}
        return SimpleNamespace(log_probs=self.outputs.logps, **fields)


def theirs(
    policy: TokenLogps, ref_logps: Tensor, targets: Tensor, options: dict[str, Any], first: int = 0
) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss and what it logs. ``first``: whether each row's first token is a completion's."""
    options = {"loss_weights": None, "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False} | options
    names = options["loss_type"] if isinstance(options["loss_type"], list) else [options["loss_type"]]
    model = TheirModel(policy)
    reference = TheirModel(TokenLogps(ref_logps))
    trainer = SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
        ),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05), gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        beta=0.1,
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        loss_types=names,
        loss_weights=options["loss_weights"] or [1.0] * len(names),
        label_smoothing=options["label_smoothing"],
        ld_alpha=options["ld_alpha"],
        use_weighting=options["use_weighting"],
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    # The mask is of input_ids, of which targets are those from the second on.
    mask = torch.nn.functional.pad((targets != -100).long(), (1, 0), value=first)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def by_token(batch: Batch) -> tuple[TokenLogps, Tensor]:
    """float32 of the policy and the reference, from full logits in float64."""
    exact = batch.double()
    outputs = exact.outputs()
    narrow = {name: getattr(outputs, name).float() for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs")}
    return TokenLogps(**narrow, is_top1=outputs.is_top1), exact.ref_logps().float()


@pytest.mark.parametrize(("options", "renamed"), CASES, ids=IDS)
def test_drop_in_dpo_loss_has_the_numbers_of_trl(options: dict[str, Any], renamed: dict[str, Any]) -> None:
    for seed in range(3):
        batch = make_batch(seed, 4, 9, 16, 60, torch.float32)
        policy, ref_logps = by_token(batch)
        loss, logged = theirs(policy, ref_logps, batch.targets, options)
        rows, (hidden, *_) = batch.with_leaves()
        output = dpo_loss(**rows.policy(), ref_logps=ref_logps, outputs=OUTPUTS, **options, **renamed)
        torch.testing.assert_close(output.loss, loss, **TOLERANCE)
        metrics = output.metrics()
        assert metrics.keys() == logged.keys() - {"num_tokens"}
        for name, value in metrics.items():
            torch.testing.assert_close(value.item(), logged[name], **TOLERANCE, msg=name)
        # And the gradient: theirs by token, through our log-probabilities from full logits.
        policy.logps.requires_grad_()
        (slopes,) = torch.autograd.grad(theirs(policy, ref_logps, batch.targets, options)[0], policy.logps)
        exact, leaves = batch.double().with_leaves()
        expected = torch.autograd.grad(exact.outputs().logps, leaves[0], slopes.double())[0]
        torch.testing.assert_close(torch.autograd.grad(output.loss, hidden)[0], expected.float(), **TOLERANCE)


@pytest.mark.parametrize(
    ("options", "renamed"), [case for case in CASES if not {"ld_alpha", "use_weighting"} & set(case[0])]
)
def test_drop_in_preference_loss_has_the_numbers_of_trl(options: dict[str, Any], renamed: dict[str, Any]) -> None:
    batch = make_batch(7, 4, 9, 16, 60, torch.float32)
    policy, ref_logps = by_token(batch)
    loss, logged = theirs(policy, ref_logps, batch.targets, options)
    lengths = (batch.targets != -100).sum(1).chunk(2)
    losses, chosen_rewards, rejected_rewards = preference_loss(
        *policy.logps.sum(1).chunk(2),
        *ref_logps.sum(1).chunk(2),
        0.1,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        **options,
        **renamed,
    )
    torch.testing.assert_close(losses.mean(), loss, **TOLERANCE)
    torch.testing.assert_close(chosen_rewards.mean().item(), logged["rewards/chosen"], **TOLERANCE)
    torch.testing.assert_close(rejected_rewards.mean().item(), logged["rewards/rejected"], **TOLERANCE)


def test_drop_in_differs_from_trl_where_it_says_so() -> None:
    batch = make_batch(1, 4, 9, 16, 60, torch.float32)
    policy, ref_logps = by_token(batch)

    def ours(**options: Any) -> Tensor:
        return dpo_loss(**batch.policy(), ref_logps=ref_logps, **options).loss

    # TRL's sigmoid and sigmoid_norm accept a label_smoothing that they do not use; ours are conservative DPO.
    for name in ("sigmoid", "sigmoid_norm"):
        smoothed = {"loss_type": name, "label_smoothing": 0.2}
        their_loss = theirs(policy, ref_logps, batch.targets, smoothed)[0]
        torch.testing.assert_close(ours(loss_type=name), their_loss, **TOLERANCE)
        assert abs(ours(**smoothed) - their_loss) > DIFFERENT
    # A likelihood is by default each completion's own mean, so that a batch is the mean of its parts.
    assert abs(ours(loss_type="sft") - theirs(policy, ref_logps, batch.targets, {"loss_type": "sft"})[0]) > DIFFERENT
    # A row's first token is predicted by nothing. Where it is a completion's, TRL counts it in ipo's and sigmoid_norm's
    # lengths though no log-probability of it is in their sums.
    longer = torch.nn.functional.pad(batch.targets, (1, 0), value=0)
    for name in ("ipo", "sigmoid_norm"):
        torch.testing.assert_close(
            ours(loss_type=name), theirs(policy, ref_logps, batch.targets, {"loss_type": name})[0], **TOLERANCE
        )
        their_loss = theirs(policy, ref_logps, batch.targets, {"loss_type": name}, first=1)[0]
        lengths = (longer != -100).sum(1).chunk(2)
        sums = (*policy.logps.sum(1).chunk(2), *ref_logps.sum(1).chunk(2))
        as_they_count = preference_loss(
            *sums, 0.1, loss_type=name, chosen_lengths=lengths[0], rejected_lengths=lengths[1]
        )[0]
        torch.testing.assert_close(as_they_count.mean(), their_loss, **TOLERANCE)
        assert abs(ours(loss_type=name) - their_loss) > DIFFERENT
    # WPO with a likelihood, which TRL cannot compute.
    both = {"loss_type": ["sigmoid", "sft"], "use_weighting": True}
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        theirs(policy, ref_logps, batch.targets, both)
    assert ours(**both, sft_reduction="batch").isfinite()
