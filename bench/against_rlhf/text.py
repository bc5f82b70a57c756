"""The text task: the reviews of ``fastdpo demo``, a small Llama that writes them, and the reward that is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from against_rlhf.task import Task
from transformers import AutoTokenizer, LlamaForCausalLM

from fastdpo.demo import DemoConfig
from fastdpo.demo.corpus import draw_prompts
from fastdpo.demo.reward import true_reward
from fastdpo.demo.sampling import Completion
from fastdpo.demo.stages import make_base_model

HELD_OUT, TRAINING = 256, 3_200
MODEL = "base_model"


def make_text_model(config: DemoConfig, folder: Path) -> None:
    """Trains the model that all arms start from, unless ``folder`` has it; it never sees a held-out prompt."""
    if not (folder / MODEL).exists():
        model, tokenizer, _ = make_base_model(config, held_out=_held_out())
        unfinished = folder / f"{MODEL}-unfinished"
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder / MODEL)


def load_text_task(config: DemoConfig, folder: Path) -> Task:
    """The task with the model of :func:`make_text_model`."""
    held_out = _held_out()
    return Task(
        name="text",
        model=LlamaForCausalLM.from_pretrained(folder / MODEL).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / MODEL),
        prompts=draw_prompts(TRAINING, random.Random("training prompts"), exclude=held_out),
        held_out=held_out,
        reward=_reward,
        max_new_tokens=config.max_new_tokens,
    )


def _held_out() -> list[str]:
    return draw_prompts(HELD_OUT, random.Random("held-out prompts"))


def _reward(completions: Sequence[Completion]) -> list[float]:
    return [true_reward(completion.text) for completion in completions]
