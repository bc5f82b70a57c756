from __future__ import annotations

import copy
import math
import os
import random
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from processes import spawn
from tiny_models import make_model
from torch import Tensor, nn
from toy_data import chat_rows, make_tokenizer, text_rows
from trainer_runs import LOGP_TOLERANCE, LORA, METRICS, GradientRecorder, config, make_trainer
from transformers import TrainingArguments

from fastdpo.data import PreferenceCollator, prepare
from fastdpo.loss import oracle as reference_losses
from fastdpo.model.randomness import disable_dropout
from fastdpo.trainer import DPOConfig, DPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def losses(trainer: DPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= rtol * gradient.norm() + 1e-9, name


@torch.no_grad()
def metrics_from_logits(policy: nn.Module, reference: nn.Module, batch: dict[str, Tensor], beta: float) -> dict:
    """Every metric of one batch, from full logits in float64."""
    policy, reference = (copy.deepcopy(model).double().eval() for model in (policy, reference))
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    targets = ids[:, 1:, None]

    def score(model: nn.Module) -> tuple[Tensor, Tensor]:
        z = model(**inputs).logits[:, :-1]
        return z, (z.log_softmax(-1).gather(-1, targets)[..., 0] * mask).sum(-1)

    z, logps = score(policy)
    rewards = beta * (logps - score(reference)[1])
    chosen, rejected = rewards.chunk(2)
    chosen_mask, rejected_mask = mask.chunk(2)
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    top1 = z.argmax(-1, keepdim=True) == targets
    return {
        "loss": -nn.functional.logsigmoid(chosen - rejected).mean().item(),
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/accuracies": (chosen > rejected).double().mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
        "logps/chosen": logps.chunk(2)[0].mean().item(),
        "logps/rejected": logps.chunk(2)[1].mean().item(),
        "logits/chosen": z.mean(-1).chunk(2)[0][chosen_mask].mean().item(),
        "logits/rejected": z.mean(-1).chunk(2)[1][rejected_mask].mean().item(),
        "entropy": entropy[mask].mean().item(),
        "mean_token_accuracy": top1[..., 0].chunk(2)[0][chosen_mask].double().mean().item(),
    }


def whole_batch(tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    dataset, _ = prepare(Dataset.from_list(rows), tokenizer)
    return PreferenceCollator(tokenizer.pad_token_id)(list(dataset))


# --------------------------------------------------------------------------------------------------------------------
# Loss and metrics
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, math.log(2)),
        ({"label_smoothing": 0.2}, math.log(2)),
        ({"loss_type": "hinge"}, 1.0),
        ({"loss_type": "ipo", "beta": 0.2}, (1 / 0.4) ** 2),
        ({"loss_type": ["sigmoid"], "gradient_checkpointing": False}, math.log(2)),
        ({"bf16": True}, math.log(2)),
    ],
)
def test_first_loss_is_the_one_of_equal_policy_and_reference(tmp_path, tokenizer, options, expected):
    trainer = make_trainer(tmp_path, tokenizer, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the check at step 0 has nothing to say
        trainer.train()
    first, second = losses(trainer)
    assert first == pytest.approx(expected, rel=1e-6)
    assert second != first
    entry = trainer.state.log_history[0]
    assert entry.keys() >= METRICS | {"num_tokens", "grad_norm", "learning_rate"}
    assert entry["rewards/chosen"] == entry["rewards/rejected"] == entry["rewards/margins"] == 0


@pytest.mark.parametrize("loss_type", ["simpo", "orpo", "cpo"])
def test_losses_without_a_reference_have_none(tmp_path, tokenizer, loss_type):
    rows, beta = text_rows(4), 0.7
    model = make_model("llama", seed=3)
    batch = whole_batch(tokenizer, rows)
    mask = batch["completion_mask"][:, 1:].bool()
    with torch.no_grad():
        z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    logps = z.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    sides = [reference_losses.Completion(row[scored]) for row, scored in zip(logps, mask, strict=True)]
    expected = sum(reference_losses.losses(sides[:4], sides[4:], beta=beta, loss_type=loss_type)) / 4
    rewards = reference_losses.rewards(sides[:4], sides[4:], beta=beta, loss_type=loss_type)

    options = {"model": model, "train_dataset": Dataset.from_list(rows), "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, tokenizer, loss_type=loss_type, beta=beta, max_steps=1, **options)
    assert trainer.ref_model is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # there is nothing to check at step 0
        trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert entry["rewards/chosen"] == pytest.approx(float(sum(chosen for chosen, _ in rewards)) / 4, rel=1e-5)
    with pytest.raises(
        ValueError, match=f"loss_type {loss_type} has no reference, but a reference is given .ref_model"
    ):
        make_trainer(tmp_path, tokenizer, loss_type=loss_type, ref_model=make_model("llama"))


def test_metrics_are_those_of_full_logits(tmp_path, tokenizer):
    policy, reference = make_model("gemma2", seed=1), make_model("gemma2", seed=2)
    rows = text_rows(5)
    batch = whole_batch(tokenizer, rows)
    expected = metrics_from_logits(policy, reference, batch, beta=0.3)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=policy,
        ref_model=reference,
        train_dataset=Dataset.from_list(rows),
        per_device_train_batch_size=5,
        max_steps=1,
        beta=0.3,
    )
    with pytest.warns(UserWarning, match="do not agree before the first update"):
        trainer.train()
    entry = trainer.state.log_history[0]
    for name, value in expected.items():
        assert entry[name] == pytest.approx(value, rel=1e-5, abs=LOGP_TOLERANCE), name
    assert entry["num_tokens"] == batch["attention_mask"].sum()


def test_metrics_are_means_over_the_logging_window_however_it_is_cut(tmp_path, tokenizer):
    # 5 pairs as 2 + 2 + 1: a mean of the three means would weigh the last pair twice.
    policy, reference = make_model("llama", seed=1), make_model("llama", seed=2)
    expected = metrics_from_logits(policy, reference, whole_batch(tokenizer, text_rows(5)), beta=0.1)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=policy,
        ref_model=reference,
        rows=5,
        max_steps=-1,
        num_train_epochs=1,
        logging_steps=3,
        learning_rate=0.0,
    )
    with pytest.warns(UserWarning, match="do not agree"):
        trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["step"] == 3
    for name in METRICS:
        assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=LOGP_TOLERANCE), name


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (3, 2), (1, 4)])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, tokenizer, batch_size, accumulation):
    def gradients(**options: Any) -> dict[str, Tensor]:
        recorder = GradientRecorder()
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            ref_model=make_model("llama", seed=1),
            rows=4,
            callbacks=[recorder],
            max_steps=1,
            max_grad_norm=0.0,
            **options,
        )
        with pytest.warns(UserWarning, match="do not agree"):
            trainer.train()
        assert len(recorder.steps) == 1
        recorder.steps[0]["loss"] = torch.tensor(losses(trainer)[0])
        return recorder.steps[0]

    whole = gradients(per_device_train_batch_size=4)
    # Three and then one: the last micro-batch is uneven.
    parts = gradients(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    assert_same_gradients(parts, whole)


def test_mixture_of_experts_adds_its_load_balancing_loss(tmp_path, tokenizer):
    def train(**options: Any) -> dict[str, float]:
        trainer = make_trainer(tmp_path, tokenizer, model=make_model("mixtral"), max_steps=1, **options)
        trainer.train()
        return trainer.state.log_history[0]

    entry = train(router_aux_loss_coef=0.5)
    assert entry["aux_loss"] > 0
    assert entry["loss"] == pytest.approx(math.log(2) + 0.5 * entry["aux_loss"], rel=1e-6)
    assert train()["loss"] == pytest.approx(math.log(2) + 0.001 * entry["aux_loss"], rel=1e-6)  # Mixtral's own weight
    without = train(router_aux_loss_coef=0.0)
    assert without["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert "aux_loss" not in without


# --------------------------------------------------------------------------------------------------------------------
# The reference
# --------------------------------------------------------------------------------------------------------------------


def test_reference_model_is_an_unchanging_copy(tmp_path, tokenizer):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, tokenizer, model=model)
    trainer.train()
    after = trainer.ref_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


def test_cached_reference_gives_the_run_of_the_online_one(tmp_path, tokenizer):
    runs = {}
    for cached in (False, True):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            eval_dataset=Dataset.from_list(text_rows(3)),
            eval_strategy="steps",
            eval_steps=2,
            max_steps=4,
            precompute_ref_log_probs=cached,
        )
        assert (trainer.ref_model is None) == cached
        trainer.train()
        runs[cached] = trainer
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(runs[True].train_dataset.column_names)
    for online, cached in zip(runs[False].state.log_history, runs[True].state.log_history, strict=True):
        for name in set(online) & ({"loss", "eval_loss"} | METRICS):
            assert cached[name] == pytest.approx(online[name], rel=1e-4, abs=LOGP_TOLERANCE), name
    with pytest.raises(ValueError, match="the reference freed"):
        runs[True].evaluate(Dataset.from_list(text_rows(2)))


def test_reference_columns_need_no_reference_model(tmp_path, tokenizer):
    with_columns = make_trainer(tmp_path, tokenizer, precompute_ref_log_probs=True).train_dataset
    trainer = make_trainer(tmp_path, tokenizer, train_dataset=with_columns)
    assert trainer.ref_model is None
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match="which are the reference"):
        make_trainer(tmp_path, tokenizer, train_dataset=with_columns, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="column ref_chosen_logps alone"):
        make_trainer(tmp_path, tokenizer, train_dataset=with_columns.remove_columns("ref_rejected_logps"))


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_is_trained_against_the_model_without_it(tmp_path, tokenizer, extra, checkpointing):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **extra)
    trainer = make_trainer(
        tmp_path, tokenizer, model=model, peft_config=peft_config, max_steps=3, gradient_checkpointing=checkpointing
    )
    assert trainer.ref_model is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    first, _, third = losses(trainer)
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert third != first
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert any(p.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)
    with trainer.model.disable_adapter():
        base = trainer.model.get_base_model()
        assert torch.equal(
            base.model.layers[0].self_attn.q_proj.base_layer.weight, before["model.layers.0.self_attn.q_proj.weight"]
        )


def test_a_trained_adapter_begins_as_its_own_reference(tmp_path, tokenizer):
    def trained() -> nn.Module:
        model = get_peft_model(make_model("llama"), LORA)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return model

    for options in ({}, {"precompute_ref_log_probs": True}, {"ref_model": trained()}):
        trainer = make_trainer(tmp_path, tokenizer, model=trained(), **options)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_model_is_loaded_by_name_with_its_tokenizer(tmp_path, tokenizer):
    model = make_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = DPOTrainer(str(tmp_path / "model"), args=config(tmp_path), train_dataset=Dataset.from_list(chat_rows(4)))
    assert trainer.model.dtype == torch.float32
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    args = config(tmp_path, model_init_kwargs='{"dtype": "bfloat16"}')
    trainer = DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=Dataset.from_list(text_rows(4)))
    assert trainer.model.dtype == trainer.ref_model.dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------------------------
# The check at step 0
# --------------------------------------------------------------------------------------------------------------------


def test_start_is_checked_when_dropout_is_left_on(tmp_path, tokenizer):
    model = make_model("gpt2", attn_pdrop=0.3, resid_pdrop=0.3)
    trainer = make_trainer(tmp_path, tokenizer, model=model, disable_dropout=False)
    with pytest.warns(UserWarning, match="dropout is active"):
        trainer.train()


def test_disable_dropout_reaches_the_probabilities_that_layers_keep(tmp_path, tokenizer):
    model = make_model("llama", attention_dropout=0.5).train()
    ids = torch.arange(12)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


# --------------------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------------------


def test_evaluation_has_the_metrics_of_all_pairs(tmp_path, tokenizer):
    policy, reference = make_model("llama", seed=1), make_model("llama", seed=2)
    expected = metrics_from_logits(policy, reference, whole_batch(tokenizer, text_rows(5)), beta=0.1)
    rows = Dataset.from_list(text_rows(5))
    trainer = make_trainer(
        tmp_path, tokenizer, model=policy, ref_model=reference, eval_dataset=rows, per_device_eval_batch_size=2
    )
    for metrics in (trainer.evaluate(), trainer.evaluate(rows)):  # prepared at the start, and raw
        for name, value in expected.items():
            assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5, abs=LOGP_TOLERANCE), name
    assert trainer.state.log_history[0].keys() >= {f"eval_{name}" for name in METRICS}
    named = trainer.evaluate({"first": rows.select(range(2)), "second": rows.select(range(2, 5))})
    assert (2 * named["eval_first_loss"] + 3 * named["eval_second_loss"]) / 5 == pytest.approx(expected["loss"])


def test_evaluation_before_training_is_in_the_precision_of_training(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=Dataset.from_list(text_rows(3)), bf16=True)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_a_metric_can_choose_the_best_checkpoint(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        eval_dataset=Dataset.from_list(text_rows(3)),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=True,
        max_steps=3,
    )
    trainer.train()
    margins = [e["eval_rewards/margins"] for e in trainer.state.log_history if "eval_rewards/margins" in e]
    assert len(margins) == 3
    assert trainer.state.best_metric == max(margins)


# --------------------------------------------------------------------------------------------------------------------
# Resume
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"precompute_ref_log_probs": True}, {"peft_config": LORA}], ids=["online", "cached", "lora"]
)
def test_resumed_run_equals_the_unbroken_one(tmp_path, tokenizer, options):
    def make(output_dir: Path) -> DPOTrainer:
        # Dropout is on, so that the state of the random number generators counts.
        model = make_model("llama", attention_dropout=0.2)
        return make_trainer(
            output_dir,
            tokenizer,
            model=model,
            rows=9,
            max_steps=7,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=3,
            disable_dropout=False,
            **options,
        )

    unbroken = make(tmp_path / "unbroken")
    with pytest.warns(UserWarning, match="dropout is active"):
        unbroken.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    of_this_process = ("runtime", "per_second", "peak_memory")
    timeless = [
        [{k: v for k, v in entry.items() if not any(word in k for word in of_this_process)} for entry in history[:7]]
        for history in (unbroken.state.log_history, resumed.state.log_history)
    ]
    assert len(losses(unbroken)) == 7
    assert timeless[0] == timeless[1]
    for got, expected in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(got, expected)


# --------------------------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------------------------


def _train_on_rank(rank: int, port: int, output_dir: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    # A process takes its two pairs in one part or in two, as they are long: processes differ in how often they run.
    options = {"max_tokens_per_batch": 200}
    runs = [_train_three_epochs(Path(output_dir), rows, 2, **options) for rows in (text_rows(8), _groups())]
    torch.save(runs, f"{output_dir}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def _groups() -> list[dict[str, Any]]:
    """Groups of 2 to 5 answers after prompts that begin alike, and 1 to 4 pairs: processes differ in how many."""
    rng = random.Random(0)
    system = [rng.randrange(3, 384) for _ in range(9)]
    return [
        {
            "prompt_ids": [*system, *(rng.randrange(3, 384) for _ in range(5 + i))],
            "completion_ids": [[rng.randrange(3, 384) for _ in range(3 + 5 * k)] for k in range(2 + i % 4)],
            "pairs": [[0, 1]] if i % 4 == 0 else [[2, 0], [0, 1], [1, 2], [0, i % 4 + 1]][: i % 5 + 1],
        }
        for i in range(8)
    ]


def _train_three_epochs(
    output_dir: Path, rows: list[dict[str, Any]], batch_size: int, **options: Any
) -> dict[str, Any]:
    recorder = GradientRecorder()
    rows = Dataset.from_list(rows)
    trainer = make_trainer(
        output_dir,
        make_tokenizer(),
        train_dataset=rows,
        eval_dataset=rows.select(range(5)),
        callbacks=[recorder],
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
        max_steps=3,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.1,
        **options,
    )
    trainer.train()
    return {"log": trainer.state.log_history, "gradients": recorder.steps}


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_train_on_rank, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for rows, *runs in zip((text_rows(8), _groups()), *ranks, strict=True):
        one = _train_three_epochs(tmp_path, rows, 4)
        for step, expected in enumerate(one["gradients"]):
            for run in runs:
                got = {name.removeprefix("module."): value for name, value in run["gradients"][step].items()}
                assert_same_gradients(got, expected, rtol=1e-4)
        # Means over both processes, and over 5 evaluation rows although one is repeated to make 6.
        for entry, expected in zip(runs[0]["log"], one["log"], strict=True):
            assert entry.keys() == expected.keys()
            names = METRICS | {"loss", "num_tokens"}
            for name in {*names, *(f"eval_{name}" for name in names)} & expected.keys():
                assert entry[name] == pytest.approx(expected[name], rel=1e-4, abs=LOGP_TOLERANCE), name


# --------------------------------------------------------------------------------------------------------------------
# Misuse
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"loss_type": "dpo"}, "loss_type is 'dpo'"),
        ({"loss_type": ["sigmoid", "simpo"], "ld_alpha": 0.5}, "'simpo' does not define it"),
        ({"loss_type": "aot", "max_tokens_per_batch": 64}, "depends on the whole batch"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "does not define label_smoothing"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch is 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it should be at least 1"),
        ({"per_device_eval_batch_size": -2}, "per_device_eval_batch_size is -2"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it should be a finite number, 0 or above"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"num_train_epochs": 0.0, "max_steps": -1}, "num_train_epochs is 0.0; it should be above 0, or max_steps"),
        ({"packing": "dense"}, "packing is 'dense'; it should be one of auto, shared, repeated, padded"),
        ({"truncation_mode": "middle"}, "truncation_mode is 'middle'"),
        ({"precompute_ref_batch_size": 4}, "precompute_ref_batch_size would have no effect"),
    ],
)
def test_config_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_config_defaults_run_on_this_machine(tmp_path):
    args = DPOConfig(str(tmp_path))
    assert args.bf16 == torch.cuda.is_available()
    assert args.gradient_checkpointing
    assert not DPOConfig(str(tmp_path), gradient_checkpointing=False).activation_checkpointing
    assert (args.learning_rate, args.logging_steps, args.beta, args.max_length) == (1e-6, 10, 0.1, 1024)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")
def test_config_takes_bfloat16_without_an_accelerator(tmp_path):
    args = DPOConfig(str(tmp_path), bf16=True)
    assert args.device == torch.device("cpu") and args.bf16


def test_trainer_refuses(tmp_path, tokenizer):
    model = make_model("llama")
    rows = Dataset.from_list(text_rows(2))

    def refuses(error: type[Exception], message: str, **options: Any) -> None:
        arguments = {"model": model, "args": config(tmp_path), "train_dataset": rows, "processing_class": tokenizer}
        with pytest.raises(error, match=message):
            DPOTrainer(**(arguments | options))

    refuses(TypeError, "args is a TrainingArguments", args=TrainingArguments(str(tmp_path)))
    refuses(TypeError, "model is a Linear", model=nn.Linear(2, 2))
    refuses(TypeError, "ref_model is a str", ref_model="gpt2")
    refuses(ValueError, "same object as model", ref_model=model)
    refuses(TypeError, "train_dataset is a NoneType", train_dataset=None)
    refuses(TypeError, "train_dataset is a list", train_dataset=text_rows(2))
    refuses(TypeError, "the eval dataset is a list", eval_dataset=text_rows(2))
    refuses(TypeError, "peft_config is a dict", peft_config={"r": 4})
    refuses(ValueError, "has an adapter already", model=get_peft_model(make_model("llama"), LORA), peft_config=LORA)
    refuses(TypeError, "processing_class is a str", processing_class="gpt2")
    refuses(ValueError, "processing_class is None", processing_class=None)
    refuses(ValueError, "model_init_kwargs is", args=config(tmp_path, model_init_kwargs={"dtype": "bfloat16"}))
    refuses(ValueError, "router_aux_loss_coef is 0.1", args=config(tmp_path, router_aux_loss_coef=0.1))
    refuses(ValueError, "pad_token is '<nothing>'", args=config(tmp_path, pad_token="<nothing>"))


def test_tokenised_rows_are_taken_as_they_are(tmp_path, tokenizer):
    rows, _ = prepare(Dataset.from_list(text_rows(4)), tokenizer)
    trainer = DPOTrainer(make_model("llama"), args=config(tmp_path), train_dataset=rows)
    assert trainer.train_dataset.to_list() == rows.to_list()
    assert trainer.data_summaries == {}
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    raw = make_trainer(tmp_path, tokenizer, rows=4)
    assert raw.train_dataset.to_list() == rows.to_list()
    assert raw.data_summaries["train"].rows_in == 4
