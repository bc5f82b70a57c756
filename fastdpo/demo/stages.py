"""The stages of the demo, without a word on the screen: what benchmarks and notebooks can call as well."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from fastdpo.demo.config import DemoConfig
from fastdpo.demo.corpus import Review, write_corpus
from fastdpo.demo.language_model import build_model, pretrain, train_tokenizer
from fastdpo.demo.preferences import Preference, label_pairs
from fastdpo.demo.sampling import Completion, TokenSamples, decode, sample_batches
from fastdpo.trainer import DPOConfig, DPOTrainer


def rng_for(config: DemoConfig, purpose: str) -> random.Random:
    """A source of chance of its own for each purpose: more draws in one place change nothing in another."""
    return random.Random(f"{config.seed}/{purpose}")


def generator_for(config: DemoConfig, purpose: str) -> torch.Generator:
    """The same for torch, on the CPU."""
    return torch.Generator().manual_seed(rng_for(config, purpose).getrandbits(60))


def make_base_model(
    config: DemoConfig,
    *,
    held_out: Collection[str],
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[Review]]:
    """Corpus, tokenizer and base model; no review answers a prompt of ``held_out``."""
    corpus = write_corpus(config.corpus_size, rng_for(config, "corpus"), exclude=held_out)
    tokenizer = train_tokenizer((review.prompt + review.text for review in corpus), config.vocab_size)
    model = build_model(tokenizer, hidden_size=config.hidden_size, layers=config.layers, seed=config.seed)
    pretrain(
        model,
        tokenizer,
        corpus,
        steps=config.base_steps,
        batch_size=config.base_batch_size,
        learning_rate=config.base_learning_rate,
        rng=rng_for(config, "batches"),
        on_step=on_step,
    )
    return model, tokenizer, corpus


def sample_texts(
    config: DemoConfig,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    purpose: str,
    on_batch: Callable[[int], None] = lambda count: None,
) -> tuple[list[Completion], list[TokenSamples]]:
    """One completion of each prompt at temperature 1, as texts and as tokens."""
    batches = sample_batches(
        model,
        tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        generator=generator_for(config, purpose),
        on_batch=on_batch,
    )
    return decode(tokenizer, prompts, batches), batches


def sample_pairs(
    config: DemoConfig,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[Preference]:
    """Two completions of each prompt, labelled by chance in proportion to the true reward."""
    first, _ = sample_texts(config, model, tokenizer, prompts, purpose="first of pairs", on_batch=on_batch)
    second, _ = sample_texts(config, model, tokenizer, prompts, purpose="second of pairs", on_batch=on_batch)
    return label_pairs(first, second, rng_for(config, "labels"))


@dataclass(frozen=True)
class Aligned:
    """What DPO made: the model, the trainer's log, and its last evaluation on the held-out pairs."""

    model: LlamaForCausalLM
    log_history: list[dict[str, Any]]
    metrics: dict[str, float]


class _Report(TrainerCallback):
    """Tells a function about each step: steps done so far, and the last logged metrics."""

    def __init__(self, on_step: Callable[[int, dict[str, float]], None]) -> None:
        self._on_step = on_step
        self._last: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:
            self._last = logs

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._on_step(state.global_step, self._last)


def align(
    config: DemoConfig,
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_pairs: Sequence[Preference],
    eval_pairs: Sequence[Preference],
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> Aligned:
    """Train a copy of ``base`` by DPO, with another copy as the reference; ``base`` stays as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        args = DPOConfig(
            output_dir=scratch,
            beta=config.beta,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.steps // 10,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=64,
            max_length=None,
            seed=config.seed,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=max(1, config.steps // 50),
            eval_strategy="steps",
            # Never at the last step, where it is evaluated in any case.
            eval_steps=config.steps // 3 + 1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        policy = copy.deepcopy(base)
        trainer = DPOTrainer(
            policy,
            copy.deepcopy(base),
            args,
            train_dataset=_as_dataset(train_pairs),
            eval_dataset=_as_dataset(eval_pairs),
            processing_class=tokenizer,
            callbacks=[_Report(on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        metrics = trainer.evaluate()
    return Aligned(policy.eval(), trainer.state.log_history, metrics)


def _as_dataset(pairs: Sequence[Preference]) -> Dataset:
    return Dataset.from_list(
        [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    )
