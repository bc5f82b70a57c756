"""preference_loss: its arguments, and what it says to misuse. (Its numbers are in test_objectives.py.)"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo import preference_loss
from fastdpo.loss.oracle import losses_of_sequences


def test_takes_the_authors_positional_arguments() -> None:
    a, b, c, d = torch.randn(4, 5, dtype=torch.float64).unbind(0)

    def expected(reference: bool = True, **options: Any) -> Tensor:
        return losses_of_sequences(torch.cat((a, b)), torch.cat((c, d)) if reference else None, beta=0.2, **options)

    values, chosen, rejected = preference_loss(a, b, c, d, 0.2, 0.1)
    torch.testing.assert_close(values, expected(label_smoothing=0.1))
    torch.testing.assert_close(chosen, 0.2 * (a - c))
    torch.testing.assert_close(rejected, 0.2 * (b - d))
    torch.testing.assert_close(preference_loss(a, b, c, d, 0.2, 0.0, True)[0], expected(loss_type="ipo"))
    for refs in ((None, None), (c, d)):
        torch.testing.assert_close(preference_loss(a, b, *refs, 0.2, 0.0, False, True)[0], expected(reference=False))
    a.requires_grad_()
    assert not preference_loss(a, b, c, d, 0.2)[1].requires_grad


LOGPS = {
    name: torch.zeros(3)
    for name in (
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
    )
}
MISUSE = [
    ({"beta": 0.0}, "beta is 0.0; it should be above 0"),
    ({"loss_type": "dpo"}, "loss_type is 'dpo'; it should be one of sigmoid, sigmoid_norm, hinge"),
    ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it should be at least 0 and below 0.5"),
    ({"label_smoothing": 0.1, "loss_type": "hinge"}, "loss_type 'hinge' does not define label_smoothing"),
    ({"ipo_reduction": "mean"}, "loss_type 'sigmoid' does not define ipo_reduction; it defines average_log_prob"),
    ({"ipo_reduction": "max", "loss_type": "ipo"}, "ipo_reduction is 'max'; it should be one of 'mean', 'sum'"),
    ({"loss_type": "ipo"}, "give chosen_lengths and rejected_lengths"),
    ({"ipo": True, "loss_type": "hinge"}, "ipo=True means loss_type='ipo'"),
    ({"reference_chosen_logps": None}, "reference_chosen_logps is None; give a tensor, or reference_free=True"),
    ({"policy_rejected_logps": torch.zeros(2)}, "policy_rejected_logps has shape (2,); it should be that of policy"),
    ({"pair_weights": torch.zeros(2)}, "pair_weights has shape (2,); it should be that of policy_chosen_logps, (3,)"),
    (
        {"average_log_prob": True},
        "loss_type 'sigmoid' takes means over tokens: give chosen_lengths and rejected_lengths",
    ),
    ({"loss_type": "ipo"}, "give chosen_lengths and rejected_lengths, or ipo_reduction='sum'"),
    ({"loss_type": "simpo"}, "reference_chosen_logps is given, but loss_type 'simpo' has no reference; it should be"),
    ({"ld_alpha": 0.5}, "ld_alpha needs the log-probabilities of tokens, of which these are sums; use dpo_loss"),
    ({"use_weighting": True}, "use_weighting needs the log-probabilities of tokens"),
    (
        {"f_divergence_type": "forward_kl", "reference_free": True},
        "f_divergence_type is 'forward_kl', a divergence from a reference, but none is given",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISUSE)
def test_misuse(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        preference_loss(**({"beta": 0.1} | LOGPS | arguments))


def test_what_is_no_dense_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="policy_rejected_logps is a list; it should be a torch.Tensor"):
        preference_loss(**{"beta": 0.1} | LOGPS | {"policy_rejected_logps": [0.0, 0.0, 0.0]})
    with pytest.raises(TypeError, match="reference_chosen_logps is a tensor of layout torch.sparse_coo"):
        preference_loss(**{"beta": 0.1} | LOGPS | {"reference_chosen_logps": torch.ones(3).to_sparse()})


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_sorted_losses_count_a_pair_as_often_as_its_weight_says(loss_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logps = [torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)]
    times = torch.tensor([1, 0, 3, 2, 1])
    weighted = preference_loss(*logps, 0.3, loss_type=loss_type, pair_weights=times.double())[0]
    expected = preference_loss(*(x.repeat_interleave(times) for x in logps), 0.3, loss_type=loss_type)[0]
    torch.testing.assert_close(weighted.sum(), expected.sum(), rtol=1e-14, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logps[:2]) for x in (weighted, expected)))
    assert weighted[1] == 0


def test_pairs_of_shared_sequences() -> None:
    logps, refs = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-1.5, -2.0, -2.5])
    pairs = torch.tensor([[0, 1], [0, 2], [2, 1]])
    found, *_ = preference_loss(*logps[pairs].unbind(1), *refs[pairs].unbind(1), 0.5)
    ratios = 0.5 * (logps - refs)
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(ratios[pairs[:, 0]] - ratios[pairs[:, 1]]))
