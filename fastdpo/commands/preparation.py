"""What ``train`` and ``cache-ref`` print once the data is read and the reference asked."""

from __future__ import annotations

from rich.console import Console

from fastdpo.trainer.trainer import DPOTrainer

console = Console(highlight=False, soft_wrap=True)


def say_what_was_prepared(trainer: DPOTrainer) -> None:
    """Print what became of the rows, where the reference's log-probabilities are, and how many were there before."""
    for name, summary in trainer.data_summaries.items():
        console.print(f"\n[bold]{name}[/]", summary.table(), sep="\n")
    for name, split in trainer.reference_splits.items():
        computed = split.rows - split.rows_read
        how = f"{split.rows_read} pairs read, {computed} computed" if computed else f"{split.rows_read} pairs read"
        console.print(f"Reference log-probabilities, {name}: {how}, {split.seconds:.1f} s: {split.folder}")
