"""``fastdpo demo``: the stages one after the other, what is shown meanwhile, and what is left behind."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import platform
import statistics
import time
from importlib.metadata import version
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console

from fastdpo.demo.config import DemoConfig
from fastdpo.demo.corpus import draw_prompts
from fastdpo.demo.folder import OutputFolder
from fastdpo.demo.measures import Mean, measure_fluency, measure_rewards
from fastdpo.demo.pictures import draw_rewards
from fastdpo.demo.preferences import label_pairs
from fastdpo.demo.progress import Phases
from fastdpo.demo.sampling import Completion, sequence_kl
from fastdpo.demo.stages import align, make_base_model, rng_for, sample_pairs, sample_texts
from fastdpo.demo.tables import results_table, samples_table
from fastdpo.report.picture import draw_training

_SHOWN_SAMPLES = 4


def run(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Run the demo; returns what it writes to ``summary.json``.

    Raises:
        fastdpo.errors.UsageError: the output folder cannot be used.
    """
    start = time.perf_counter()
    folder = OutputFolder(config.output_dir)
    if deleted := folder.clear_earlier_demo():
        console.print(f"{config.output_dir} held an earlier demo: its {deleted} files were deleted.")
    folder.check_free(
        "base_model", "dpo_model", "pairs.jsonl", "samples.jsonl", "rewards.png", "training.png", "summary.json"
    )
    _quieten()
    if config.threads:
        torch.set_num_threads(config.threads)
    phases = Phases(console, count=4)
    held_out = draw_prompts(config.eval_prompts, rng_for(config, "held-out prompts"))
    train_prompts = draw_prompts(config.pairs, rng_for(config, "training prompts"), exclude=held_out)

    with phases.phase("base_model", "A small language model learns to write reviews", config.base_steps) as bar:
        base, tokenizer, corpus = make_base_model(
            config, held_out=held_out, on_step=lambda _, loss: bar.advance(1, f"loss {loss:.2f}")
        )
        base.save_pretrained(folder.root / "base_model")
        tokenizer.save_pretrained(folder.root / "base_model")
        folder.note_contents("base_model")
    parameters = base.num_parameters()
    console.print(
        f"   {parameters / 1e6:.1f} million parameters, {len(tokenizer):,} tokens, {len(corpus):,} reviews such as:\n"
        f"   [italic]{corpus[0].prompt}{corpus[0].text}[/]",
        highlight=False,
    )

    count = 2 * (len(train_prompts) + len(held_out))
    with phases.phase("pairs", "It writes pairs of reviews; a simulated person picks the better one", count) as bar:
        pairs = sample_pairs(config, base, tokenizer, train_prompts, bar.advance)
        before, _ = sample_texts(config, base, tokenizer, held_out, purpose="before", on_batch=bar.advance)
        second, _ = sample_texts(config, base, tokenizer, held_out, purpose="second", on_batch=bar.advance)
        held_out_pairs = label_pairs(before, second, rng=None)
        _write_lines(folder, "pairs.jsonl", [dataclasses.asdict(pair) for pair in pairs])
    agreement = statistics.fmean(pair.is_right for pair in pairs)
    console.print(
        f"   {len(pairs):,} pairs ({len(train_prompts) - len(pairs)} left out: the same text twice, or cut off); "
        f"{agreement:.0%} of the choices agree with the true reward",
        highlight=False,
    )

    with phases.phase("dpo", "DPO learns from the choices alone", config.steps) as bar:
        aligned = align(
            config, base, tokenizer, pairs, held_out_pairs, lambda _, logged: bar.advance(1, _describe(logged))
        )
        aligned.model.save_pretrained(folder.root / "dpo_model")
        tokenizer.save_pretrained(folder.root / "dpo_model")
        folder.note_contents("dpo_model")
        title = f"fastdpo demo: {len(pairs):,} pairs, beta {config.beta:g}"
        draw_training(aligned.log_history, folder.file("training.png"), title=title)

    with phases.phase("evaluation", "Both models on held-out prompts", len(held_out)) as bar:
        after, batches = sample_texts(config, aligned.model, tokenizer, held_out, purpose="after", on_batch=bar.advance)
        kl = Mean.of(torch.cat([sequence_kl(aligned.model, base, batch) for batch in batches]).tolist())
        old, new = measure_rewards(before), measure_rewards(after)
        fluency = measure_fluency(before, base, tokenizer), measure_fluency(after, base, tokenizer)
        draw_rewards(old, new, fluency, folder.file("rewards.png"), f"fastdpo demo: KL {kl.value:.1f} nats a text")
        _write_samples(folder, before, old, after, new)

    accuracy = aligned.metrics["eval_rewards/accuracies"]
    mean_old, mean_new = Mean.of(old), Mean.of(new)
    summary = {
        "true_reward_before": mean_old.value,
        "true_reward_before_se": mean_old.error,
        "true_reward_before_std": mean_old.deviation,
        "true_reward_after": mean_new.value,
        "true_reward_after_se": mean_new.error,
        "true_reward_after_std": mean_new.deviation,
        "gain_in_std": (mean_new.value - mean_old.value) / mean_old.deviation,
        "kl": kl.value,
        "kl_se": kl.error,
        "preference_accuracy": accuracy,
        "preference_accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(held_out_pairs)),
        "label_agreement": agreement,
        "pairs": len(pairs),
        "held_out_pairs": len(held_out_pairs),
        "fluency_before": dataclasses.asdict(fluency[0]),
        "fluency_after": dataclasses.asdict(fluency[1]),
        "parameters": parameters,
        "seconds": time.perf_counter() - start,
        "seconds_by_phase": phases.seconds,
        "settings": dataclasses.asdict(config) | {"output_dir": str(config.output_dir)},
        "versions": {name: version(name) for name in ("fastdpo", "torch", "transformers", "tokenizers")}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }
    folder.file("summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print()
    console.print(samples_table(before, after, _SHOWN_SAMPLES))
    console.print(results_table(summary))
    _say_what_next(console, config, summary)
    return summary


def _describe(logged: dict[str, float]) -> str:
    if not logged:
        return ""
    return f"loss {float(logged['loss']):.3f}, {logged['rewards/accuracies']:.0%} of pairs right"


def _quieten() -> None:
    """Bars and notes of the libraries, which would break up the demo's own."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def _write_lines(folder: OutputFolder, name: str, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    folder.file(name).write_text(text, encoding="utf-8")


def _write_samples(
    folder: OutputFolder, before: list[Completion], old: list[float], after: list[Completion], new: list[float]
) -> None:
    rows = [
        {"prompt": b.prompt, "before": b.text, "reward_before": o, "after": a.text, "reward_after": n}
        for b, o, a, n in zip(before, old, after, new, strict=True)
    ]
    _write_lines(folder, "samples.jsonl", rows)


def _say_what_next(console: Console, config: DemoConfig, summary: dict[str, Any]) -> None:
    out, gain = config.output_dir, summary["gain_in_std"]
    before, after = (summary[f"fluency_{when}"]["grammatical"] for when in ("before", "after"))
    console.print(
        f"\nThe reward {'rose' if gain > 0 else 'fell'} by {abs(gain):.1f} standard deviations of the base model's "
        f"texts; {before:.0%} of them were grammatical, and {after:.0%} are now. {summary['seconds']:.0f} s in all.\n"
        f"Look at {out / 'rewards.png'}, then at {out / 'training.png'}.\n"
        f"Next: a longer leash with `fastdpo demo --beta {config.beta / 4:g}`, or the same pairs by hand:\n"
        f"  fastdpo train --model_name_or_path {out / 'base_model'} --dataset_name {out / 'pairs.jsonl'} "
        f"--learning_rate {config.learning_rate:g} --output_dir my-model",
        highlight=False,
        soft_wrap=True,
    )
