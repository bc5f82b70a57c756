"""The trainers that are compared, each with the settings it may choose from.

An arm's first setting is its usual one. All arms train the same model on the same pairs, four to an optimiser step,
and those of one order must have the same losses.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.trainers import trainer_classes
from datasets import Dataset
from end_to_end.cases import TrainCase, make_model
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

Setting = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A trainer and how it is used.

    Attributes:
        library: fastdpo or trl.
        about: one line for the reader of a table.
        order: one of ``data.ORDERS``.
        cached: the reference's log-probabilities are computed once, before training.
        our_head: TRL with ``fastdpo.integrations.trl.enable()``.
        groups: a row is a prompt with all of its answers, and not a pair.
        before: fastdpo as it is in another checkout.
        options: what is given to its DPOConfig in every setting.
        choices: option -> values; every combination is a setting, and the fastest is measured.
    """

    library: str
    about: str
    order: str = "shuffled"
    cached: bool = False
    our_head: bool = False
    groups: bool = False
    before: bool = False
    options: Setting = field(default_factory=dict)
    choices: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The rows that it trains on."""
        return f"{self.order}-groups.jsonl" if self.groups else f"{self.order}.jsonl"

    def settings(self, case: TrainCase) -> list[Setting]:
        """The combinations of the choices."""
        choices = dict(self.choices)
        if _MICRO_BATCH in choices:
            choices[_MICRO_BATCH] = tuple(size for size in choices[_MICRO_BATCH] if case.pairs % size == 0)
        return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


# Micro-batches of an optimiser step's pairs, with and without recomputed activations. TRL's padding_free and keep_end
# are left out: the first does nothing in TRL 1.16 ("temporarily unavailable"), the second changes the data.
_MICRO_BATCH = "per_device_train_batch_size"
_TRL_CHOICES = {"gradient_checkpointing": (False, True), _MICRO_BATCH: (4, 3, 2, 1)}
_OUR_CHOICES = {"gradient_checkpointing": (False, True), "max_tokens_per_batch": (None, 2_048)}

ARMS: dict[str, Arm] = {
    "trl": Arm("trl", "as it is after installation"),
    "trl+head": Arm("trl", "the same, with fastdpo.integrations.trl", our_head=True),
    "trl-best": Arm(
        "trl", "cached reference, grouped lengths, tuned", order="grouped", cached=True, choices=_TRL_CHOICES
    ),
    "trl-best+head": Arm(
        "trl",
        "the same, with fastdpo.integrations.trl, tuned",
        order="grouped",
        cached=True,
        our_head=True,
        choices=_TRL_CHOICES,
    ),
    "fastdpo": Arm("fastdpo", "as it is after installation"),
    "fastdpo-padded": Arm("fastdpo", "the same, padded rows", options={"packing": "padded"}),
    "fastdpo-cached": Arm("fastdpo", "cached reference, tuned", order="grouped", cached=True, choices=_OUR_CHOICES),
    "fastdpo-cached-repeated": Arm(
        "fastdpo",
        "the same, packed rows with every prompt twice",
        order="grouped",
        cached=True,
        options={"packing": "repeated"},
        choices=_OUR_CHOICES,
    ),
    "fastdpo-before": Arm(
        "fastdpo",
        "as fastdpo-cached, in another checkout",
        order="grouped",
        cached=True,
        before=True,
        choices=_OUR_CHOICES,
    ),
    "fastdpo-groups": Arm(
        "fastdpo",
        "as fastdpo-cached, a row for each prompt with its answers",
        order="grouped",
        cached=True,
        groups=True,
        options={"pairs": "all"},
        choices=_OUR_CHOICES,
    ),
}


def by_option(settings: list[Setting], tried: list[dict[str, Any]]) -> Iterator[Setting]:
    """A few of all combinations: each value of the last option, with the first ones of the others; then, with the best
    of them, those of the option before it; and so on.

    Args:
        settings: all of them, the usual one first.
        tried: of those that were handed out, ``setting`` and ``seconds``, or ``failed``, as the caller enters them.
    """
    best = settings[0]
    for option in reversed(best):
        for setting in settings:
            others = {name: value for name, value in setting.items() if name != option}
            if others.items() <= best.items() and all(one["setting"] != setting for one in tried):
                yield setting
        worked = [one for one in tried if "failed" not in one]
        best = min(worked, key=lambda one: one["seconds"])["setting"] if worked else best


def make_trainer(
    arm: Arm,
    setting: Setting,
    case: TrainCase,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The arm's trainer for the case; with a cached reference, that is computed here."""
    trainer_class, config_class = trainer_classes(arm.library)
    if arm.our_head:
        from fastdpo.integrations import trl

        trl.enable()
    batch = case.prompts if arm.groups else case.pairs
    options = {_MICRO_BATCH: batch, **arm.options, **setting}
    options["gradient_accumulation_steps"] = batch // options[_MICRO_BATCH]
    args = config_class(
        str(output),
        max_steps=case.steps + case.warmup,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        optim=case.optim,
        beta=case.beta,
        max_length=case.max_length,
        bf16=case.dtype == "bfloat16" and case.weights == "float32",
        use_cpu=case.device == "cpu",
        precompute_ref_log_probs=arm.cached,
        train_sampling_strategy="sequential",  # the rows come in the arm's order
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    model = make_model(case)
    trainer = trainer_class(
        model,
        None if arm.cached else copy.deepcopy(model),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if len(trainer.train_dataset) != len(rows):
        raise RuntimeError(f"{arm.library} keeps {len(trainer.train_dataset)} of {len(rows)} pairs")
    return trainer
