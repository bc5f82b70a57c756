"""TR-DPO: the reference is where the paper's update puts it, also after a resume."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import differences, id_rows, losses
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import make_model
from torch import Tensor
from trainer_runs import LORA, config
from transformers import TrainerCallback

from fastdpo.errors import InputError
from fastdpo.trainer import DPOTrainer
from fastdpo.trainer.models import make_models
from fastdpo.trainer.moving_reference import REFERENCE_FILE, MovingReference

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

ROWS = id_rows(8, 90)


def llama(**options: Any) -> Any:
    return make_model("llama", 96, **options)


def adapted() -> Any:
    torch.manual_seed(0)
    return get_peft_model(llama(), LORA)


class Weights(TrainerCallback):
    """Keeps the policy's weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.steps.append({name: p.detach().clone() for name, p in model.named_parameters()})


def run(folder: Path, model: Any, resume: Any = None, **options: Any) -> DPOTrainer:
    defaults = {"max_steps": 5, "sync_ref_model": True, "gradient_checkpointing": False, "learning_rate": 1e-2}
    callbacks = options.pop("callbacks", None)
    given = {name: options.pop(name) for name in ("ref_model", "train_dataset", "eval_dataset") if name in options}
    args = config(folder, **(defaults | options))
    trainer = DPOTrainer(model, args=args, callbacks=callbacks, **({"train_dataset": ROWS} | given))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def reference_of(trainer: DPOTrainer) -> dict[str, Tensor]:
    return dict(trainer.ref_model.named_parameters())


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_the_reference_is_the_papers_mixture(tmp_path: Path, alpha: float) -> None:
    seen = Weights()
    model = llama()
    expected = {name: p.detach().double() for name, p in copy.deepcopy(model).named_parameters()}
    trainer = run(tmp_path, model, callbacks=[seen], ref_model_mixup_alpha=alpha, ref_model_sync_steps=2)
    for step in (2, 4):
        expected = {n: alpha * seen.steps[step - 1][n].double() + (1 - alpha) * p for n, p in expected.items()}
    for name, found in reference_of(trainer).items():
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-6, atol=1e-7)
    # And it is what the losses are measured against: the last step's reward is that of step 4's policy.
    still = run(tmp_path / "still", llama(), sync_ref_model=False)
    assert losses(trainer)[:2] == losses(still)[:2]
    assert losses(trainer)[2] != losses(still)[2]
    if alpha == 1:
        assert losses(trainer)[2] == losses(trainer)[4] == pytest.approx(math.log(2), abs=1e-6)


def test_16_bit_references_are_mixed_in_float32(tmp_path: Path) -> None:
    seen, model = Weights(), llama(dtype=torch.bfloat16)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"max_steps": 1, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 1}
    trainer = run(tmp_path, model, callbacks=[seen], packing="padded", **options)
    for name, found in reference_of(trainer).items():
        exact = 0.3 * seen.steps[0][name].double() + 0.7 * start[name].double()
        assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-30).all(), name


def test_an_adapter_is_copied_and_not_mixed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer = run(tmp_path, adapted(), **options)
    assert losses(trainer) == pytest.approx([math.log(2)] * 5, abs=1e-6)
    shared = {p.data_ptr() for p in trainer.model.parameters()}
    assert sum(p.data_ptr() not in shared for p in trainer.ref_model.parameters()) == 8, "the base is there once"


@pytest.mark.parametrize("alpha", [0.6, 1.0])
@pytest.mark.parametrize("given", [False, True])
def test_an_adapters_reference_does_not_move_where_weights_are_sharded(
    tmp_path: Path, alpha: float, given: bool
) -> None:
    """Nor one that was given: of what ZeRO-3 has divided nothing would be mixed, and nobody would say so."""
    args = config(tmp_path, sync_ref_model=True, ref_model_mixup_alpha=alpha)
    with pytest.raises(NotImplementedError, match="^sync_ref_model with an adapter is not supported with FSDP"):
        make_models(adapted(), adapted() if given else None, args, None, needs_reference=True, is_sharded=True)


def deltas(model: Any, name: str = "default") -> dict[str, Tensor]:
    """What an adapter adds to each weight."""
    return {
        key: (layer.scaling[name] * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()).detach()
        for key, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.95])
def test_a_mixture_of_adapters_is_the_papers_of_their_weights(alpha: float) -> None:
    """Also when the first of them have left it."""
    policy, reference = adapted(), adapted()
    policy.base_model.model.model.norm.weight.requires_grad_(True)  # beside the adapter, and mixed as it is
    moving = MovingReference(policy, reference, alpha=alpha, steps=1)
    expected, norm = deltas(reference), reference.base_model.model.model.norm.weight.detach().clone()
    torch.manual_seed(1)
    for number in range(60):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        moving.update()
        ours = deltas(policy)
        expected = {key: alpha * ours[key] + (1 - alpha) * expected[key] for key in ours}
        if number in (0, 1, 10, 59):
            for key, found in deltas(reference).items():
                scale = float(expected[key].abs().max())
                torch.testing.assert_close(found, expected[key], rtol=1e-5, atol=1e-5 * scale)
        norm = alpha * policy.base_model.model.model.norm.weight + (1 - alpha) * norm
    torch.testing.assert_close(reference.base_model.model.model.norm.weight, norm, rtol=1e-5, atol=1e-6)
    assert {layer.lora_A["default"].weight.shape[0] for layer in lora_layers(reference)} == {
        LORA.r * {0.3: 47, 0.6: 19, 0.95: 6}[alpha]
    }


def lora_layers(model: Any) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def test_an_adapter_that_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    for lora in (
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=4, target_modules=["embed_tokens"]),
    ):
        with pytest.raises(ValueError, match="is below 1, and the adapter's .* of these no mixture is one adapter"):
            run(tmp_path, get_peft_model(llama(), lora))
    with pytest.raises(ValueError, match="model has an adapter that is not PEFT's LoRA"):
        run(tmp_path, get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])))
    with pytest.raises(ValueError, match="a mixture of 1656 adapters, and take more than the weights of"):
        run(tmp_path, adapted(), ref_model_mixup_alpha=0.01)


@pytest.mark.parametrize(("make", "alpha"), [(llama, 0.6), (adapted, 1.0), (adapted, 0.5)])
def test_a_resumed_run_has_the_reference_of_its_checkpoint(tmp_path: Path, make: Any, alpha: float) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "ref_model_sync_steps": 2}
    options["ref_model_mixup_alpha"] = alpha
    unbroken = run(tmp_path, make(), **options)
    checkpoint = tmp_path / "checkpoint-3"
    resumed = run(tmp_path, make(), str(checkpoint), **options)
    assert differences(resumed, unbroken) == []
    ours, theirs = reference_of(resumed), reference_of(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(InputError, match="sync_ref_model was True and is False"):
        run(tmp_path, make(), str(checkpoint), save_strategy="no", sync_ref_model=False)
    (checkpoint / REFERENCE_FILE).write_bytes(b"")
    with pytest.raises(InputError, match=REFERENCE_FILE):
        run(tmp_path, make(), str(checkpoint), **options)


def test_the_best_model_comes_with_its_reference(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1, "max_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "logps/chosen", "greater_is_better": False}
    trainer = run(tmp_path, llama(), eval_dataset=ROWS, loss_type=["sigmoid", "sft"], **options)
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    policy = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, policy[name]) for name, p in reference_of(trainer).items())


def test_what_stands_still_cannot_follow(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precompute_ref_log_probs .or ref_cache. keeps"):
        config(tmp_path, sync_ref_model=True, ref_cache=str(tmp_path))
    with pytest.raises(ValueError, match="loss_type 'simpo' has none"):
        config(tmp_path, sync_ref_model=True, loss_type="simpo")
    with pytest.raises(ValueError, match="ref_model_sync_steps would have no effect without sync_ref_model"):
        config(tmp_path, ref_model_sync_steps=3)
    for alpha in (0, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            config(tmp_path, sync_ref_model=True, ref_model_mixup_alpha=alpha)
    with pytest.raises(ValueError, match="at least 1"):
        config(tmp_path, sync_ref_model=True, ref_model_sync_steps=0)
    told = ROWS.map(lambda row: {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0})
    with pytest.raises(ValueError, match="which are the reference and stay as they are"):
        run(tmp_path, llama(), train_dataset=told)
    with pytest.raises(ValueError, match=r"a ref_model of model's own kind, and they differ in .*norm"):
        run(tmp_path, llama(), ref_model=make_model("qwen3", 96))
