"""DPO three times over: a plain loop with full logits, TRL's trainer, and fastdpo's.

All take the same steps: the same pairs in the same batches and order, AdamW, a warm-up, gradients clipped at norm 1.
The reference's log-probabilities are computed once, before training.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import random
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from against_rlhf.forwards import counted
from against_rlhf.run import Run, Settings
from against_rlhf.task import batches_of_pairs
from common.trainers import CACHE_METHODS, trainer_classes
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, get_scheduler

from fastdpo.demo.language_model import IGNORED, encode_completions
from fastdpo.demo.preferences import Preference

WARMUP = 10  # steps
REFERENCE_BATCH = 32  # pairs

# Token ids of prompt, chosen and rejected; the completions with their end token.
TokenRow = tuple[list[int], list[int], list[int]]


def schedule(settings: Settings) -> str:
    """After the warm-up, by transformers' names: half a cosine down to 0, or a constant."""
    return "cosine" if settings.decay else "constant_with_warmup"


def training_pairs(run: Run) -> list[Preference]:
    """The pairs of the run's steps, batch after batch: as many as it needs, or all, to be taken again and again.

    They are drawn at random, and put into batches by length.

    Raises:
        ValueError: there is less than a batch.
    """
    size = run.settings.batch_size
    if len(run.pairs) < size:
        raise ValueError(f"there are {len(run.pairs)} pairs, less than one batch of {size}")
    rng = random.Random(f"{run.settings.seed}/pairs")
    drawn = rng.sample(run.pairs, size * min(run.settings.steps, len(run.pairs) // size))
    return list(itertools.chain(*batches_of_pairs(drawn, size, rng)))


# --------------------------------------------------------------------------------------------------------------------
# A plain loop
# --------------------------------------------------------------------------------------------------------------------


def train_dpo_eager(run: Run) -> LlamaForCausalLM:
    """DPO as a plain loop: padded batches, full logits, log_softmax, gather."""
    settings, ledger = run.settings, run.ledger
    ledger.begin("update")
    policy = copy.deepcopy(run.task.model).train()
    with counted(policy, ledger):
        rows = _tokenise(run, training_pairs(run))
        ledger.end()
        with ledger.part("reference"):
            reference = _reference_logps(policy, rows)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
        scheduler = get_scheduler(schedule(settings), optimizer, WARMUP, settings.steps)
        stop = run.look(0, policy)
        for step in range(settings.steps):
            if stop:
                break
            with ledger.part("update"):
                begin = step * settings.batch_size % len(rows)
                batch = slice(begin, begin + settings.batch_size)
                chosen, rejected = (_logps(policy, rows[batch]) - reference[:, batch].flatten()).chunk(2)
                loss = -F.logsigmoid(settings.beta * (chosen - rejected)).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
            if (step + 1) % settings.look_every == 0:
                stop = run.look(step + 1, policy)
    return policy


def _tokenise(run: Run, pairs: Sequence[Preference]) -> list[TokenRow]:
    prompts = [pair.prompt for pair in pairs]
    chosen = encode_completions(run.task.tokenizer, prompts, [pair.chosen for pair in pairs])
    rejected = encode_completions(run.task.tokenizer, prompts, [pair.rejected for pair in pairs])
    return [(prompt, a, b) for (prompt, a), (_, b) in zip(chosen, rejected, strict=True)]


def _logps(model: LlamaForCausalLM, rows: Sequence[TokenRow]) -> Tensor:
    """Of whole completions, [2B]: the chosen ones, then the rejected ones."""
    sequences = [(row[0], row[side]) for side in (1, 2) for row in rows]
    ids = pad_sequence([torch.tensor(prompt + text) for prompt, text in sequences], batch_first=True)
    targets = pad_sequence(
        [torch.tensor([IGNORED] * len(prompt) + text) for prompt, text in sequences],
        batch_first=True,
        padding_value=IGNORED,
    )
    ids, targets = ids.to(model.device), targets[:, 1:].to(model.device)
    # Padding is on the right and attention is causal: no mask is needed.
    logps = model(ids[:, :-1], use_cache=False).logits.log_softmax(dim=-1)
    logps = logps.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (logps * (targets != IGNORED)).sum(dim=1)


@torch.no_grad()
def _reference_logps(model: LlamaForCausalLM, rows: Sequence[TokenRow]) -> Tensor:
    """[2, rows]: of the chosen and of the rejected completions."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + max(len(rows[i][1]), len(rows[i][2])))
    logps = torch.empty(2, len(rows), device=model.device)
    for start in range(0, len(rows), REFERENCE_BATCH):
        batch = order[start : start + REFERENCE_BATCH]
        logps[:, batch] = _logps(model, [rows[i] for i in batch]).view(2, -1)
    return logps


# --------------------------------------------------------------------------------------------------------------------
# Trainers
# --------------------------------------------------------------------------------------------------------------------


def train_dpo_trl(run: Run) -> LlamaForCausalLM:
    """DPO by ``trl.DPOTrainer``."""
    return _train_dpo("trl", run)


def train_dpo_fastdpo(run: Run) -> LlamaForCausalLM:
    """DPO by ``fastdpo.DPOTrainer``."""
    return _train_dpo("fastdpo", run, packing="auto")


def _train_dpo(library: str, run: Run, **options: Any) -> LlamaForCausalLM:
    settings, ledger = run.settings, run.ledger
    trainer_class, config_class = trainer_classes(library)  # importing it is not the run's time
    trainer_class = _timing_its_reference(trainer_class, CACHE_METHODS[library], run)
    # fastdpo keeps the reference's log-probabilities in the folder, and would read those of a run before.
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as scratch, _quiet():
        ledger.begin("update")
        policy = copy.deepcopy(run.task.model)
        args = config_class(
            str(Path(scratch)),
            beta=settings.beta,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=schedule(settings),
            warmup_steps=WARMUP,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            seed=settings.seed,
            max_length=None,
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=REFERENCE_BATCH,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=policy.device.type == "cpu",
            train_sampling_strategy="sequential",  # the pairs come in their order
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        with counted(policy, ledger):
            pairs = training_pairs(run)
            trainer = trainer_class(
                policy,
                None,  # the policy, before it is trained
                args,
                train_dataset=_as_dataset(pairs, run.task.tokenizer.eos_token),
                processing_class=run.task.tokenizer,
                callbacks=[_Looks(run)],
            )
            if len(trainer.train_dataset) != len(pairs):
                raise RuntimeError(f"{library} keeps {len(trainer.train_dataset)} of {len(pairs)} pairs")
            trainer.remove_callback(PrinterCallback)
            ledger.end()
            if not run.look(0, policy):
                ledger.begin("update")
                trainer.train()
                ledger.end()
    return policy


def _as_dataset(pairs: Sequence[Preference], end: str) -> Dataset:
    """Completions with their end token: one that is nothing else would be taken for none."""
    return Dataset.from_dict(
        {
            "prompt": [pair.prompt for pair in pairs],
            "chosen": [pair.chosen + end for pair in pairs],
            "rejected": [pair.rejected + end for pair in pairs],
        }
    )


class _Looks(TrainerCallback):
    """Looks at the policy between steps, off the clock."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_step_end(self, _: Any, state: Any, control: Any, model: LlamaForCausalLM, **__: Any) -> None:
        if state.global_step % self._run.settings.look_every == 0:
            self._run.ledger.end()
            control.should_training_stop |= self._run.look(state.global_step, model)
            self._run.ledger.begin("update")


def _timing_its_reference(trainer_class: type[Trainer], method: str, run: Run) -> type[Trainer]:
    """The trainer, with the method that asks the reference beforehand in a part of its own."""

    def ask(self: Trainer, *args: Any) -> Any:
        run.ledger.end()
        with run.ledger.part("reference"):
            result = getattr(trainer_class, method)(self, *args)
        run.ledger.begin("update")
        return result

    return type(trainer_class.__name__, (trainer_class,), {method: ask})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, of ``datasets`` and of TRL's reference pass, which asks the environment; no old names."""
    before, shown = os.environ.get("TQDM_DISABLE"), datasets.are_progress_bars_disabled() is False
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # TRL's own
            yield
    finally:
        os.environ.pop("TQDM_DISABLE")
        if before is not None:
            os.environ["TQDM_DISABLE"] = before
        if shown:
            datasets.enable_progress_bars()
