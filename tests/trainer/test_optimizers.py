"""Optimisers of ``--optim``: trained, watched, saved, and resumed to the unbroken run's bits; what they leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import differences, id_rows, losses, run
from tiny_models import make_model
from trainer_runs import config
from transformers import Trainer, TrainingArguments

from fastdpo.errors import DivergedError
from fastdpo.trainer import DPOTrainer
from fastdpo.trainer import optimizers as optimizers_module
from fastdpo.trainer.without_effect import without_effect

pytestmark = [
    pytest.mark.usefixtures("one_thread", "quiet_and_uncached"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]

ROWS = id_rows(8, 384)
OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit")


def model() -> torch.nn.Module:
    # Matrices of 4,096 numbers and more, which are what is kept in 8 bits.
    return make_model("llama", hidden_size=64, intermediate_size=96)


def states_of(trainer: DPOTrainer) -> dict[tuple[int, str], Any]:
    """What the optimiser holds for each parameter, and for which."""
    optimizer = trainer.optimizer.optimizer  # accelerate's is around it
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {(i, name): value for i, p in enumerate(parameters) for name, value in optimizer.state[p].items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_unbroken_one(name: str, tmp_path: Path) -> None:
    options = {"optim": name, "learning_rate": 1e-3}
    expected = run(tmp_path / "unbroken", model, ROWS, **options)
    states = states_of(expected)
    assert any(value.dtype == torch.uint8 for value in states.values() if torch.is_tensor(value))
    got = run(tmp_path / "resumed", model, ROWS, str(tmp_path / "unbroken" / "checkpoint-2"), **options)
    ours, theirs = got.model.state_dict(), expected.model.state_dict()
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []
    found = states_of(got)
    assert found.keys() == states.keys()
    assert [
        name for name, value in states.items() if not torch.equal(*map(torch.as_tensor, (found[name], value)))
    ] == []
    assert losses(got) == losses(expected) and len(losses(got)) == 4 and losses(got)[3] != losses(got)[0]


def test_a_run_that_diverges_stops_before_its_state_is_saved(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="not finite"):
        run(tmp_path, model, ROWS, optim="adamw_8bit", learning_rate=1e30, max_grad_norm=0.0)


@pytest.mark.parametrize(
    ("name", "package", "by_pip"),
    [
        ("adamw_8bit", "bitsandbytes", "bitsandbytes"),
        ("adamw_torch_8bit", "torchao", "torchao"),
        ("lion_32bit", "bitsandbytes", "bitsandbytes"),
        ("galore_adamw_8bit", "galore_torch", "galore-torch"),
        ("apollo_adamw", "apollo_torch", "apollo-torch"),
        ("schedule_free_adamw", "schedulefree", "schedulefree"),
        ("stable_adamw", "optimi", "torch-optimi"),
    ],
)
def test_what_is_not_installed_is_said_in_a_line_and_first(
    name: str, package: str, by_pip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers_module, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=f"^optim is '{name}', which needs {package}: pip install {by_pip}$"):
        DPOTrainer(model(), args=config(tmp_path, optim=name), train_dataset=ROWS)


def test_others_need_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers_module, "find_spec", lambda _: None)
    for name in ("adamw_torch_fused", "adamw_torch", "sgd", "adafactor"):
        optimizers_module.check_optimizer(config(tmp_path, optim=name))


LOW_RANK = {"optim_target_modules": ["mlp", "self_attn"], "optim_args": "rank=4,update_proj_gap=3"}


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor", "apollo_adamw", "apollo_svd"])
def test_what_is_kept_beside_tensors_is_resumed(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": name, "learning_rate": 1e-3} | LOW_RANK
    if name == "apollo_svd":
        options |= {"optim": "apollo_adamw", "optim_args": "rank=4,update_proj_gap=3,proj=svd"}
    expected = run(tmp_path / "unbroken", model, ROWS, **options)
    got = run(tmp_path / "resumed", model, ROWS, str(tmp_path / "unbroken" / "checkpoint-2"), **options)
    assert losses(got) == losses(expected) and len(losses(got)) == 4
    ours, theirs = got.model.state_dict(), expected.model.state_dict()
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd"])
def test_schedule_free_saves_what_it_evaluates(name: str, tmp_path: Path) -> None:
    options = {"optim": name, "learning_rate": 0.1, "eval_dataset": ROWS}
    trainer = run(tmp_path / "unbroken", model, ROWS, **options)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.evaluate()
    trained = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for folder in (tmp_path / "saved", tmp_path / "unbroken" / "checkpoint-4"):
        saved = type(trainer.model).from_pretrained(folder)
        assert all(torch.equal(value, trained[name]) for name, value in saved.state_dict().items()), folder
    trainer.optimizer.train()  # where it is trained, which is what would have been saved
    assert not all(torch.equal(value, trained[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_radam"])
def test_a_resumed_schedule_free_run_is_the_unbroken_one(name: str, tmp_path: Path) -> None:
    options = {"optim": name, "learning_rate": 1e-2}
    expected = run(tmp_path / "unbroken", model, ROWS, **options)
    got = run(tmp_path / "resumed", model, ROWS, str(tmp_path / "unbroken" / "checkpoint-2"), **options)
    assert len(losses(got)) == 4 and differences(got, expected) == []


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"])
def test_what_steps_while_backward_runs_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^optim is '{name}', which changes a weight as soon as backward reaches it"):
        DPOTrainer(model(), args=config(tmp_path, optim=name, **LOW_RANK), train_dataset=ROWS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("galore_adamw", {"weight_decay": 0.1}, "weight_decay is 0.1, .* hand it on to galore_adamw: leave it out"),
        (
            "galore_adamw",
            {"adam_beta1": 0.8, "adam_beta2": 0.9},
            "is 0.8 and adam_beta2 is 0.9, .* leave them out",
        ),
        ("apollo_adamw", {"weight_decay": 0.1}, "weight_decay is 0.1"),
        ("apollo_adamw", {"adam_beta2": 0.95}, "adam_beta2 is 0.95, .* hand it on to apollo_adamw for all weights"),
        ("galore_adamw", {"optim_target_modules": None}, "^optim is 'galore_adamw', which needs optim_target_modules"),
        ("schedule_free_sgd", {"warmup_steps": 0.1}, "first step would be 10 times as large .* number of steps$"),
        ("grokadamw", {"adam_epsilon": 1e-6}, "adam_epsilon is 1e-06"),
    ],
)
def test_arguments_that_would_be_lost_are_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        DPOTrainer(model(), args=config(tmp_path, optim=name, **(LOW_RANK | options)), train_dataset=ROWS)


# Of each optimiser that can be made here, what some of its optim_args may be.
MADE = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor", "adamw_8bit", "paged_adamw_32bit"), ""),
    **dict.fromkeys(("lion_8bit", "paged_lion_32bit"), ""),
    **dict.fromkeys(("ademamix", "paged_ademamix_8bit", "rmsprop"), "alpha=0.5"),
    **{"sgd": "momentum=0.5", "adagrad": "lr_decay=0.5", "grokadamw": "lamb=1"},
    **dict.fromkeys(("galore_adamw", "galore_adafactor", "apollo_adamw"), "rank=3"),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"), "r=0.5"),
}
GIVEN = {"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.5, "warmup_steps": 3, "optim_args": None}


@pytest.mark.parametrize("name", MADE)
def test_what_reaches_an_optimiser_is_neither_named_nor_refused_and_all_else_is(name: str, tmp_path: Path) -> None:
    lm = model()

    def groups(**options: Any) -> list[dict[str, Any]]:
        told = {"optim_target_modules": "all-linear", "use_cpu": True, **options}
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=name, **told), lm)
        parameters = kwargs.pop("params", None) or list(lm.parameters())
        made = [{**group, "params": None} for group in cls(parameters, **kwargs).param_groups]
        return [{"all": {**kwargs, "betas": None, "eps": None}, **group} for group in made]

    plain = groups()
    for argument, value in GIVEN.items():
        value = MADE[name] if argument == "optim_args" else value
        # Some of optim_args are of the weights in optim_target_modules, and are called so.
        of_groups = any if argument == "optim_args" else all
        reaches = of_groups(now != before for now, before in zip(groups(**{argument: value}), plain, strict=True))
        # By a constant schedule, that nothing else warms up.
        settings = {"lr_scheduler_type": "constant", "optim": name, argument: value or "rank=3"}
        named = without_effect({argument: (settings[argument], None)}, settings, raises=False)
        try:
            optimizers_module.check_optimizer(
                config(tmp_path, save_strategy="no", optim_target_modules="all-linear", **settings)
            )
            refused = False
        except ValueError:
            refused = True
        assert (not named and not refused) == reaches, (argument, named, refused)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adafactor", "apollo_adamw", "grokadamw"])
def test_they_are_lost_in_transformers(name: str, tmp_path: Path) -> None:
    """And no others: what :func:`check_optimizer` refuses does not change a weight there."""
    arguments = {"weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1.0}

    def trained(**options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        options |= {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 2, **LOW_RANK}
        told = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        kept = TrainingArguments(str(tmp_path), optim=name, **told, **options)
        rows = [{"input_ids": torch.arange(4, 12), "labels": torch.arange(4, 12)} for _ in range(6)]
        trainer = Trainer(model(), kept, train_dataset=rows)
        trainer.train()
        return trainer.model.state_dict()

    plain = trained()
    without_effect = [
        argument
        for argument, value in arguments.items()
        if all(torch.equal(plain[key], other) for key, other in trained(**{argument: value}).items())
    ]
    # Adafactor has neither betas nor an epsilon by these names, and does not look as if it had.
    named = optimizers_module._NOT_HANDED_ON[name]
    if name == "apollo_adamw":  # which has the others for some weights
        named = named[:1]
    assert [each for each in without_effect if each in named or "adafactor" not in name] == list(named)


def test_grokadamw_trains_where_nothing_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whose state is not brought back from a checkpoint.*save_only_model"):
        DPOTrainer(model(), args=config(tmp_path, optim="grokadamw", save_strategy="steps"), train_dataset=ROWS)
    trainer = run(tmp_path, model, ROWS, optim="grokadamw", save_only_model=True)
    assert len(losses(trainer)) == 4
