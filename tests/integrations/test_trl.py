"""TRL's trainers with our primitive switched on, against themselves: the same losses, gradients and metrics."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from tiny_models import make_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy_data import make_tokenizer, text_rows
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

import fastdpo.integrations.trl as drop_in
from fastdpo import logps
from fastdpo.logps import oracle as reference

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-5  # float32, sums of some hundred log-probabilities in another order
# By how much two float32 sums of log-probabilities, of about -300, may differ; and where a loss's slope changes by more
# than beta times itself as its log ratio changes by 1, by how much: f-divergences are taken of exp(log ratio), and
# DiscoPOP blends by sigmoid(beta log ratio / 0.05).
LOG_RATIO_ERROR = 300 * 4 * torch.finfo(torch.float32).eps
STEEPNESS = {"forward_kl": 1.0, "js_divergence": 0.5, "alpha_divergence": 0.5, "discopop": 0.1 / 0.05}
PATCHED = ("_ChunkedLogProbFunction", "_use_triton")
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ALL_OUTPUTS = ("log_probs", *OPTIONAL)

LOSS_TYPES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each of the two functions was called; and TRL is itself again after every test."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(logps, "token_logps", counted("ours", logps.token_logps))
    monkeypatch.setattr(
        ChunkedLogProbFunction, "forward", staticmethod(counted("theirs", ChunkedLogProbFunction.forward))
    )
    yield counts
    drop_in.disable()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def make_trainer(
    name: str, folder: Path, model: nn.Module, rows: list[dict[str, Any]], tokenizer: Any, **options: Any
) -> Any:
    """trl.{name}Trainer, with a reference model that is not the policy where there is one."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    others: dict[str, Any] = {}
    if name in ("DPO", "KTO") and not isinstance(model, peft.PeftModel):
        others["ref_model"] = nudged(copy.deepcopy(model))
    if name in ("GRPO", "RLOO"):
        others["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(str(folder), **(defaults | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **others,
    )


def nudged(model: nn.Module) -> nn.Module:
    """What trains is moved, by so little that the log ratios of sequences stay small."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    return model


def loss_and_gradients(trainer: Any) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Of the first training batch, with the metrics that were logged for it."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    torch.manual_seed(0)  # the batch's order
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert got.keys() == expected.keys() and expected
    largest = max(gradient.norm() for gradient in expected.values())
    assert largest > 0
    for name, gradient in expected.items():
        # A sequence's rounding error reaches every parameter, also where the sequences' gradients cancel each other.
        error = (got[name] - gradient).norm()
        assert error <= tolerance * (gradient.norm() + 0.1 * largest), name


def tolerance_of(loss: str | None) -> float:
    return max(TOLERANCE, STEEPNESS.get(loss, 0.0) * LOG_RATIO_ERROR)


def assert_same_with_drop_in(trainer: Any, calls: Counter[str], tolerance: float = TOLERANCE) -> dict[str, float]:
    """Loss, gradients and metrics of a batch; the metrics."""
    calls.clear()
    theirs = loss_and_gradients(trainer)
    assert calls["theirs"] > 0 and calls["ours"] == 0
    number = calls["theirs"]
    calls.clear()
    with drop_in.enabled():
        ours = loss_and_gradients(trainer)
    assert calls == {"ours": number}
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance)
    assert_same_gradients(ours[1], theirs[1], tolerance)
    assert ours[2] == pytest.approx(theirs[2], rel=tolerance, abs=tolerance)
    return ours[2]


# ------------------------------------------------------------------------------------------- DPO


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_drop_in_dpo_loss_types(tmp_path, tokenizer, calls, loss_type):
    options = {"loss_type": loss_type, **LOSS_TYPES[loss_type]}
    trainer = make_trainer("DPO", tmp_path, make_model("llama"), text_rows(), tokenizer, **options)
    metrics = assert_same_with_drop_in(trainer, calls, tolerance_of(loss_type))
    assert metrics.keys() >= {"entropy", "logits/chosen", "mean_token_accuracy", "rewards/margins", "logps/rejected"}
    assert abs(metrics["rewards/margins"]) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"use_weighting": True},
        {"ld_alpha": 0.3},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"precompute_ref_log_probs": True},
        {"max_length": 40},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_drop_in_dpo_options(tmp_path, tokenizer, calls, options):
    trainer = make_trainer("DPO", tmp_path, make_model("qwen2"), text_rows(), tokenizer, **options)
    assert_same_with_drop_in(trainer, calls, tolerance_of(options.get("f_divergence_type")))


@pytest.mark.parametrize(
    "model_type",
    ["gpt2", "phi", "gemma2", "cohere", "granite", "hyperclovax", "nanochat"],
)
def test_drop_in_dpo_models(tmp_path, tokenizer, calls, model_type):
    """Tied embeddings, a bias, softcaps, and scales of the logits under three names."""
    trainer = make_trainer("DPO", tmp_path, make_model(model_type), text_rows(), tokenizer)
    assert_same_with_drop_in(trainer, calls)


def test_drop_in_dpo_load_balancing_loss(tmp_path, tokenizer, calls):
    model = make_model("mixtral", output_router_logits=True)
    trainer = make_trainer("DPO", tmp_path, model, text_rows(), tokenizer, router_aux_loss_coef=0.1)
    assert assert_same_with_drop_in(trainer, calls)["aux_loss"] > 0


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["frozen-head", "trained-head"])
def test_drop_in_dpo_lora(tmp_path, tokenizer, calls, modules_to_save):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=modules_to_save)
    model = peft.get_peft_model(make_model("llama"), config)
    trainer = make_trainer("DPO", tmp_path, model, text_rows(), tokenizer)
    nudged(model)  # after TRL has copied the adapter as its reference
    metrics = assert_same_with_drop_in(trainer, calls)
    assert abs(metrics["rewards/margins"]) > 1e-4


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_drop_in_dpo_gradient_checkpointing(tmp_path, tokenizer, calls, use_reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer = make_trainer("DPO", tmp_path, make_model("llama"), text_rows(), tokenizer, **options)
    trainer.model.gradient_checkpointing_enable(options["gradient_checkpointing_kwargs"])
    assert_same_with_drop_in(trainer, calls)


def test_drop_in_dpo_autocast(tmp_path, tokenizer, calls):
    """TRL rounds its logits to bfloat16, eight bits: as far as that and no further apart."""
    trainer = make_trainer("DPO", tmp_path, make_model("llama"), text_rows(), tokenizer, bf16=True)
    theirs = loss_and_gradients(trainer)
    with drop_in.enabled():
        ours = loss_and_gradients(trainer)
    assert calls["ours"] == calls["theirs"] == 2
    assert ours[0] == pytest.approx(theirs[0], rel=2**-6)
    assert_same_gradients(ours[1], theirs[1], 2**-4)
    assert {gradient.dtype for gradient in ours[1].values()} == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}],
    ids=["plain", "accumulated-and-checkpointed"],
)
def test_drop_in_dpo_training(tmp_path, tokenizer, calls, options):
    histories = []
    for switch in (contextlib.nullcontext(), drop_in.enabled()):
        calls.clear()
        with switch:
            model = make_model("llama")
            trainer = make_trainer("DPO", tmp_path, model, text_rows(), tokenizer, max_steps=4, beta=0.2, **options)
            trainer.train()
            trainer.evaluate(trainer.train_dataset)
        histories.append((trainer.state.log_history, {n: p.detach() for n, p in model.named_parameters()}))
    assert calls["ours"] > 0 and calls["theirs"] == 0
    (theirs, expected), (ours, got) = histories
    assert len(theirs) == len(ours) == 6
    for entry, other in zip(theirs, ours, strict=True):
        assert entry.keys() == other.keys()
        for name in entry:
            if name.removeprefix("eval_").removeprefix("train_") not in (
                "runtime",
                "samples_per_second",
                "steps_per_second",
            ):
                # Four updates by functions that add in different orders.
                assert other[name] == pytest.approx(entry[name], rel=10 * TOLERANCE, abs=10 * TOLERANCE), name
    start = dict(make_model("llama").named_parameters())
    assert_same_gradients(
        {n: got[n] - start[n].detach() for n in got}, {n: expected[n] - start[n].detach() for n in got}, 1e-3
    )


# ------------------------------------------------------------------------------------------- the other trainers


def test_drop_in_kto(tmp_path, tokenizer, calls):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(text_rows())]
    assert_same_with_drop_in(make_trainer("KTO", tmp_path, make_model("llama"), rows, tokenizer), calls)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_drop_in_sft(tmp_path, tokenizer, calls, loss_type):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in text_rows()]
    trainer = make_trainer("SFT", tmp_path, make_model("gemma2"), rows, tokenizer, loss_type=loss_type)
    assert_same_with_drop_in(trainer, calls)


ONLINE_OPTIONS = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "temperature": 0.8, "max_steps": 2}


def online_trainer(name: str, folder: Path, tokenizer: Any, **options: Any) -> Any:
    rows = [{"prompt": row["prompt"]} for row in text_rows()]
    model = make_model("llama")
    model.config._name_or_path = str(folder / "model")
    model.save_pretrained(folder / "model")  # the reference is loaded from there
    return make_trainer(name, folder, model, rows, tokenizer, **(ONLINE_OPTIONS | options))


@pytest.mark.parametrize(
    ("name", "options"),
    [("GRPO", {"top_entropy_quantile": 0.7, "cast_lm_head_to_fp32": True}), ("RLOO", {})],
    ids=["GRPO", "RLOO"],
)
def test_drop_in_online(tmp_path, tokenizer, calls, monkeypatch, name, options):
    def mask_far_from_its_threshold(self: Any, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """Completions of a prompt begin with the same entropy: between the two, a rounding error would decide."""
        of_tokens = entropies[mask.bool()]
        assert (of_tokens - of_tokens.quantile(threshold)).abs().min() > 1e-3
        return high_entropy_mask(self, entropies, mask, threshold)

    high_entropy_mask = trl.GRPOTrainer.get_high_entropy_mask
    monkeypatch.setattr(trl.GRPOTrainer, "get_high_entropy_mask", mask_far_from_its_threshold)
    entries = []
    for switch in (contextlib.nullcontext(), drop_in.enabled()):
        calls.clear()
        trainer = online_trainer(name, tmp_path, tokenizer, **options)
        with switch:
            trainer.train()
        entries.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert calls["ours"] > 0 and calls["theirs"] == 0
    for theirs, ours in zip(*entries, strict=True):
        for metric in ("loss", "grad_norm", "entropy", "kl", "reward"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=10 * TOLERANCE, abs=10 * TOLERANCE), metric


@pytest.mark.parametrize("options", [{"entropy_coef": 0.1}, {"use_adaptive_entropy": True, "entropy_target": 100.0}])
def test_drop_in_grpo_entropy_bonus_is_refused(tmp_path, tokenizer, options):
    trainer = online_trainer("GRPO", tmp_path, tokenizer, **options)
    with drop_in.enabled(), pytest.raises(NotImplementedError, match="entropy_coef=0.0 and use_adaptive_entropy=False"):
        trainer.train()


# ------------------------------------------------------------------------------------------- the head


def make_batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 384, (4, 20), generator=generator)
    labels = ids.clone()
    labels[:, :7] = -100
    labels[1] = -100  # a row without any label
    return {"input_ids": ids, "labels": labels}


def score(model: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> Any:
    return model(**batch, fused_lm_head=True, **options)


def gradients_of(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", ["phi", "gemma2", "cohere", "falcon_h1"])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy"), ALL_OUTPUTS])
def test_drop_in_head_outputs(model_type, outputs):
    model = make_model(model_type)
    add_fused_lm_head(model, temperature=0.7, outputs=outputs)
    batch = make_batch()
    theirs = score(model, batch)
    expected = gradients_of(model, theirs.log_probs.square().sum())
    with drop_in.enabled():
        ours = score(model, batch)
    # The gradient is ours wherever it is taken.
    assert_same_gradients(gradients_of(model, ours.log_probs.square().sum()), expected)
    assert ours.keys() == theirs.keys()
    for name in ("loss", *outputs):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=TOLERANCE, atol=TOLERANCE)
    for name in set(ALL_OUTPUTS) - set(outputs):
        assert getattr(ours, name) is None
    assert torch.equal(ours.label_mask, theirs.label_mask)


def test_drop_in_head_with_shifted_labels_and_a_count_of_items():
    model = make_model("llama")
    add_fused_lm_head(model)
    batch = make_batch()
    shifted = {"input_ids": batch["input_ids"], "shift_labels": batch["labels"]}
    options = {"num_items_in_batch": torch.tensor(7)}
    theirs = score(model, shifted, **options)
    with drop_in.enabled():
        ours = score(model, shifted, **options)
    assert ours.log_probs.shape == (4, 20)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=TOLERANCE)


def test_drop_in_scores_only_the_labels_on_every_device(monkeypatch):
    seen = []
    monkeypatch.setattr(
        logps,
        "token_logps",
        lambda *args, real=logps.token_logps, **kwargs: seen.append((args, kwargs)) or real(*args, **kwargs),
    )
    model, batch = make_model("llama"), make_batch()
    add_fused_lm_head(model)
    with drop_in.enabled():
        score(model, batch)
    ((hidden, _, targets, _), kwargs) = seen[0]
    scored = int((batch["labels"][:, 1:] != -100).sum())
    assert len(hidden) == len(targets) == kwargs["num_scored"] == scored == 3 * 13


def test_drop_in_without_any_label_is_a_differentiable_zero():
    model, batch = make_model("llama"), make_batch()
    add_fused_lm_head(model, outputs=ALL_OUTPUTS)
    batch["labels"].fill_(-100)
    with drop_in.enabled():
        out = score(model, batch)
    assert out.loss.item() == 0 and out.log_probs.shape == (4, 19)
    gradients = gradients_of(model, out.loss)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float16])
def test_drop_in_with_the_head_cast_to_float32(model_dtype):
    model, batch = make_model("phi", dtype=model_dtype), make_batch()
    add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=ALL_OUTPUTS)
    theirs = score(model, batch)
    expected = gradients_of(model, theirs.loss)
    with drop_in.enabled():
        ours = score(model, batch)
        got = gradients_of(model, ours.loss)
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=TOLERANCE, atol=TOLERANCE)
    # Gradients in the parameters' dtype, rounded once on their way through each layer.
    assert {gradient.dtype for gradient in got.values()} == {model_dtype}
    in_float = [{n: g.float() for n, g in gradients.items()} for gradients in (got, expected)]
    assert_same_gradients(*in_float, 2 * torch.finfo(model_dtype).eps)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
def test_drop_in_logps_from_16_bits_are_nearer_to_the_truth(dtype, autocast):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 48, generator=generator).to(dtype) for n in (64, 500))
    targets = torch.randint(0, 500, (64,), generator=generator)
    operands = [x.to(autocast or dtype).double() for x in (hidden, weight)]
    truth = reference.token_logps(*operands, targets, logit_scale=0.5).logps

    def error() -> float:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            log_probs, *_ = utils._ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, 1.0, 128, None, 0.5, ("log_probs",)
            )
        assert log_probs.dtype == torch.float32
        return (log_probs.double() - truth).abs().max().item()

    theirs = error()
    with drop_in.enabled():
        ours = error()
    assert ours < 1e-5 * (1 + truth.abs().max())
    assert theirs > 10 * ours


def test_drop_in_is_top1_on_a_tie():
    """TRL counts the first of equal logits alone, ours each of them."""
    hidden, weight, targets = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([0, 1, 2])
    arguments = (hidden, weight, None, targets, 1.0, 128, None, 1.0, ("is_top1",))
    assert utils._ChunkedLogProbFunction.apply(*arguments)[4].tolist() == [False, True, False]
    with drop_in.enabled():
        assert utils._ChunkedLogProbFunction.apply(*arguments)[4].tolist() == [False, True, True]


def test_drop_in_float64_gives_float32_as_trl_does():
    model, batch = make_model("llama", dtype=torch.float64), make_batch()
    add_fused_lm_head(model, outputs=ALL_OUTPUTS)
    theirs = score(model, batch)
    with drop_in.enabled():
        ours = score(model, batch)
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        assert getattr(ours, name).dtype == torch.float32
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=TOLERANCE, atol=TOLERANCE)
    assert gradients_of(model, ours.loss).keys() == dict(model.named_parameters()).keys()


# ------------------------------------------------------------------------------------------- the entropy


def test_drop_in_entropy_gradient_is_refused():
    model, batch = make_model("llama"), make_batch()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with drop_in.enabled():
        out = score(model, batch)
    assert out.entropy.requires_grad
    with pytest.raises(NotImplementedError, match="gradient into the entropy, which fastdpo computes for logging"):
        (out.loss - 0.1 * out.entropy.mean()).backward()


def test_drop_in_entropy_that_is_only_looked_at_costs_no_error():
    model, batch = make_model("llama"), make_batch()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    theirs = gradients_of(model, score(model, batch).loss)
    with drop_in.enabled():
        out = score(model, batch)
        assert_same_gradients(gradients_of(model, out.loss + 0.0 * out.entropy.sum()), theirs)
        with torch.no_grad():
            assert not score(model, batch).entropy.requires_grad


def test_drop_in_under_compile():
    """A compiled graph sends zeros into the entropy, as into all of its outputs: no error, and no gradient."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (12, 50))
    targets = torch.randint(0, 50, (12,), generator=generator)

    def head(hidden: Tensor) -> tuple[Tensor, Tensor]:
        outputs = ("log_probs", "entropy")
        log_probs, entropy, *_ = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 128, None, 1.0, outputs
        )
        return log_probs.sum(), 2 * entropy

    compiled = torch.compile(head, backend="aot_eager")
    gradients = []
    for function in (head, compiled):
        leaf = hidden.clone().requires_grad_()
        with drop_in.enabled():
            gradients += torch.autograd.grad(function(leaf)[0], leaf)
            total, entropy = function(leaf)
            with pytest.raises(NotImplementedError, match="gradient into the entropy"):
                (total + entropy.sum()).backward()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_drop_in_whole_model_checkpointed():
    model, batch = make_model("llama"), make_batch()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    theirs = gradients_of(model, score(model, batch).loss)
    with drop_in.enabled():
        loss = checkpoint(lambda: score(model, batch).loss, use_reentrant=False)
        assert_same_gradients(gradients_of(model, loss), theirs)


# ------------------------------------------------------------------------------------------- ZeRO-3


@pytest.fixture
def zero3(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Linear], SimpleNamespace]:
    """Stands for DeepSpeed: parameters of a head are empty, but inside of the context that TRL enters."""

    def partition(head: nn.Linear) -> SimpleNamespace:
        parameters = list(head.parameters())
        whole = {id(p): p.data for p in parameters}
        state = SimpleNamespace(gathered=0)

        @contextlib.contextmanager
        def gather(*asked: nn.Parameter | None) -> Iterator[None]:
            asked = [p for p in asked if p is not None]
            state.gathered += 1
            for p in asked:
                p.data = whole[id(p)].clone()
            yield
            for p in asked:
                p.data.fill_(float("nan"))  # what the memory holds is DeepSpeed's business from here on
                p.data = torch.empty(0)

        for p in parameters:
            p.data = torch.empty(0)
        monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
        monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
        return state

    return partition


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("retain_bytes", [0, 1 << 20])
def test_drop_in_gathers_a_partitioned_head_again_for_the_backward(monkeypatch, zero3, trained, retain_bytes):
    monkeypatch.setattr(logps, "token_logps", functools.partial(logps.token_logps, retain_bytes=retain_bytes))
    model, batch = make_model("phi", tie_word_embeddings=False), make_batch()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    head = model.get_output_embeddings().requires_grad_(trained)
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(score(model, batch).loss, wanted)
    state = zero3(head)
    with drop_in.enabled():
        loss = score(model, batch).loss
        assert head.weight.numel() == 0 and state.gathered == 1
        got = torch.autograd.grad(loss, wanted)
    assert head.weight.numel() == 0 and state.gathered > 1
    assert_same_gradients(dict(enumerate(got)), dict(enumerate(expected)))


# ------------------------------------------------------------------------------------------- on and off


def attributes() -> list[Any]:
    return [getattr(utils, name) for name in PATCHED]


def test_drop_in_twice_is_as_once_and_off_restores_everything():
    everything = dict(vars(utils))
    drop_in.disable()
    assert dict(vars(utils)) == everything
    drop_in.enable()
    once = attributes()
    assert all(ours is not everything[name] for ours, name in zip(once, PATCHED, strict=True))
    drop_in.enable()
    assert attributes() == once
    assert {name for name, value in vars(utils).items() if value is not everything[name]} == set(PATCHED)
    drop_in.disable()
    assert dict(vars(utils)) == everything
    drop_in.disable()
    assert dict(vars(utils)) == everything


def test_drop_in_context_leaves_what_it_found():
    before = attributes()
    with pytest.raises(KeyError), drop_in.enabled():
        assert attributes() != before
        raise KeyError
    assert attributes() == before
    drop_in.enable()
    ours = attributes()
    with drop_in.enabled():
        assert attributes() == ours
    assert attributes() == ours


def test_drop_in_reaches_models_that_were_given_their_head_before(calls):
    model, batch = make_model("llama"), make_batch()
    add_fused_lm_head(model)
    score(model, batch)
    assert calls == {"theirs": 1}
    drop_in.enable()
    score(model, batch)
    assert calls == {"theirs": 1, "ours": 1}
    drop_in.disable()
    score(model, batch)
    assert calls == {"theirs": 2, "ours": 1}


@pytest.mark.parametrize("version", ["1.15.3", "1.17.0", "2.0.0.dev0", "1.160.0"])
def test_drop_in_refuses_another_version_of_trl(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    before = attributes()
    with pytest.raises(
        RuntimeError, match=rf"TRL {version} is installed.* made for 1\.16: pip install 'trl==1\.16\.\*"
    ):
        drop_in.enable()
    assert attributes() == before


def test_drop_in_accepts_another_patch_release_of_trl(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.16.4")
    with drop_in.enabled():
        assert utils._ChunkedLogProbFunction is not ChunkedLogProbFunction


@pytest.mark.parametrize("name", [*PATCHED, "maybe_gather_lm_head_ctx"])
def test_drop_in_refuses_internals_that_are_not_there(monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.delattr(utils, name)
        with pytest.raises(RuntimeError, match=f"has no {name} in trl.trainer.utils"):
            drop_in.enable()


def test_drop_in_refuses_a_function_that_is_called_otherwise(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ChunkedLogProbFunction, "forward", staticmethod(lambda ctx, hidden, weight, targets: None))
        with pytest.raises(RuntimeError, match=r"with \(hidden, weight, targets\).* expects \(hidden, weight, bias, "):
            drop_in.enable()


def test_drop_in_says_that_trl_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="needs TRL, which is not installed"):
        drop_in.enable()
