"""The demo's results as rich tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fastdpo.demo.reward import true_reward
from fastdpo.demo.sampling import Completion


def samples_table(before: Sequence[Completion], after: Sequence[Completion], count: int) -> Table:
    """The first ``count`` prompts, with a text of the base model and one of the trained model side by side."""
    table = Table(title="The same prompts, before and after", title_justify="left", show_lines=True, expand=True)
    table.add_column("prompt", ratio=2)
    for name in ("base model", "after DPO"):
        table.add_column(name, ratio=4)
        table.add_column("reward", justify="right", no_wrap=True)
    for old, new in list(zip(before, after, strict=True))[:count]:
        cells = [cell for side in (old, new) for cell in (side.text.strip(), f"{true_reward(side.text):+.1f}")]
        table.add_row(old.prompt, *cells)
    return table


def results_table(summary: dict[str, Any]) -> Table:
    """The figures of ``summary.json`` that a person wants first."""
    table = Table(title="Held-out prompts", title_justify="left")
    table.add_column("measure")
    table.add_column("base model", justify="right")
    table.add_column("after DPO", justify="right")

    def reward(when: str) -> str:
        return f"{summary[f'true_reward_{when}']:.2f} ± {summary[f'true_reward_{when}_se']:.2f}"

    table.add_row("true reward (± standard error)", reward("before"), f"[bold]{reward('after')}[/]")
    table.add_row(
        "KL from the base model, nats a text", "0", f"{summary['kl']:.1f} ± {summary['kl_se']:.1f}", end_section=True
    )
    before, after = summary["fluency_before"], summary["fluency_after"]
    for key, name, form in (
        ("grammatical", "grammatical, nothing said twice", ".1%"),
        ("sensible", "and every adjective suits its noun", ".1%"),
        ("perplexity", "perplexity under the base model", ".2f"),
        ("distinct_1", "different words over all words", ".3f"),
        ("distinct_2", "different word pairs over all pairs", ".3f"),
        ("words", "words a text", ".1f"),
    ):
        table.add_row(name, format(before[key], form), format(after[key], form))
    table.add_section()
    table.add_row("held-out pairs in the true order", "", f"{summary['preference_accuracy']:.1%}")
    return table
