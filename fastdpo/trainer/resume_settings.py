"""What a resumed run may have otherwise than the run that it goes on with, and what becomes of it.

Some settings say which rows are trained on at which step, or what the optimiser's state is a state of: with another
value, what was done and what is to be done do not fit together, and a resume is refused. All others are as they are
asked for from the next step on, which is said. Settings that change nothing of what is trained are not looked at.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from fastdpo.errors import InputError
from fastdpo.loss.options import LossOptions
from fastdpo.model.quantization import quantization_of
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.parallelism import data_ranks

# Which rows come at which step: with ignore_data_skip, which starts at the beginning of the rows, they may differ.
ORDER = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "group_by_prompt", "pairs_per_step")
# What the optimiser's state is a state of.
OPTIMIZER = ("optim", "optim_args")
# What the policy is compared with: a reference that followed the policy cannot be found again at its start.
REFERENCE = ("sync_ref_model",)
# How the base of an adapter is quantised, for whoever merges it.
QUANTIZATION = "base_quantization"
# How rows become tokens: they may differ, as long as no row is gone or new.
TOKENS = (
    "max_length",
    "truncation_mode",
    "score",
    "end_token",
    "chat_template_path",
    "template_date",
    "pairs",
    "weight_by_score",
)
# What the optimiser keeps beside its state, and would take from the checkpoint: option -> its name in a group.
_IN_GROUPS = {
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}
SCHEDULE = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
)
_FROM_NOW_ON = (
    *SCHEDULE,
    *_IN_GROUPS,
    *(option.name for option in fields(LossOptions)),
    *TOKENS,
    "margin_alpha",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "processes",
    "packing",
    "max_tokens_per_batch",
    "pad_to_multiple_of",
    "bf16",
    "fp16",
    "tf32",
    "activation_checkpointing",
    "use_liger_kernel",
    "disable_dropout",
    "router_aux_loss_coef",
    "neftune_noise_alpha",
    "precompute_ref_log_probs",
    QUANTIZATION,
)


def settings_of(args: DPOConfig, model: PreTrainedModel | PeftModel | None = None) -> dict[str, Any]:
    """Those that a resume looks at, as JSON has them; ``model`` where it may have been cut over processes by itself."""
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * data_ranks(args, model)
    derived: dict[str, Any] = {"pairs_per_step": pairs, "processes": args.world_size}
    derived[QUANTIZATION] = quantization_of(args.init_kwargs.get("quantization_config"))
    names = dict.fromkeys((*ORDER, *OPTIMIZER, *REFERENCE, *_FROM_NOW_ON))
    return {name: _plain(derived[name] if name in derived else getattr(args, name, None)) for name in names}


def compare_settings(
    before: dict[str, Any],
    args: DPOConfig,
    rows_before: dict[str, Any],
    rows: dict[str, Any],
    model: PreTrainedModel | PeftModel | None = None,
) -> list[str]:
    """What is otherwise than in the run that is gone on with, a line a setting, for a person.

    Args:
        before, rows_before: of the checkpoint's manifest; empty for one that has none.
        args: the run's.
        rows: how many rows are trained on, and the fingerprints of their tokens, weights and margins.
        model: see :func:`settings_of`.

    Raises:
        InputError: the runs do not fit together; the message says in what, and what to do.
    """
    now = settings_of(args, model)
    differ = {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}
    kept = (*OPTIMIZER, *REFERENCE)
    refused = [name for name in differ if name in kept or (name in ORDER and not args.ignore_data_skip)]
    lines = [f"{name} was {_words(was)} and is {_words(value)}" for name, (was, value) in differ.items()]
    why = [f"{name} was {_words(differ[name][0])} and is {_words(differ[name][1])}" for name in refused]
    if words := _other_rows(rows_before, rows):
        same_count = rows_before.get("count") == rows.get("count")
        if same_count and any(name in TOKENS for name in differ):
            pass  # the same rows, of other tokens
        elif args.ignore_data_skip:
            lines.append(words)
        else:
            why.append(words)
    if why:
        raise InputError(
            f"the run that is to be resumed was another one: {'; '.join(why)}. Give what it had; or start a new run "
            "from the checkpoint's weights (--model_name_or_path CHECKPOINT)"
            + ("" if set(refused) & set(kept) else "; or begin the rows anew (--ignore_data_skip)")
        )
    return lines


def _other_rows(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is otherwise with them; empty where nothing is, or where that cannot be told."""
    if not before or not now:
        return ""
    if before.get("count") != now.get("count"):
        return f"it trained on {before.get('count'):,} rows, and there are {now.get('count'):,}"
    if before.get("fingerprint") != now.get("fingerprint"):
        return "the rows are other ones, or in another order"
    if "weights" in before and before["weights"] != now["weights"]:
        return "the rows' weights are other ones"
    # Whether margins are used at all is margin_alpha's business.
    if None not in (before.get("margins"), now["margins"]) and before["margins"] != now["margins"]:
        return "the rows' margins are other ones"
    return ""


def follow_settings(optimizer: Any, scheduler: Any, fresh: list[dict[str, Any]], changed: set[str]) -> None:
    """Have the optimiser and the schedule, which a checkpoint brought back, do what is asked for now.

    Args:
        optimizer, scheduler: as they were loaded.
        fresh: the optimiser's groups before that, without their parameters.
        changed: names of settings that differ.

    Raises:
        InputError: the schedule goes by its own state, and cannot follow another one.
    """
    keys = {_IN_GROUPS[name] for name in changed if name in _IN_GROUPS}
    for group, asked in zip(optimizer.param_groups, fresh, strict=True):
        group.update({key: asked[key] for key in keys if key in asked})
    if not changed & set(SCHEDULE):
        return
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate's is around it
    if not isinstance(schedule, LambdaLR):
        if changed & {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"}:
            raise InputError(
                f"the learning rate or its schedule is another one, but a {type(schedule).__name__} goes by what it "
                "has seen: give what the run had"
            )
        return
    schedule.base_lrs = [asked.get("initial_lr", asked["lr"]) for asked in fresh]
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = base
        rate = base * factor(schedule.last_epoch)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, (bool, int, float)):
        return getattr(value, "value", value)  # of an enumeration that is a text as well
    return str(getattr(value, "value", value))


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return "not given" if value is None else str(value)
