"""Tokens that go through a model's body, padding included, in each layout of fastdpo and in TRL's batches.

    python bench/padding.py --data pairs.jsonl               in shuffled batches of 2, 4, 8, 16 and 32 pairs
    python bench/padding.py --data pairs.jsonl --json p.json and every count

Nothing is trained and nothing is timed: both sides' collators make an epoch's batches of the same tokenised pairs in
the same order, and their ids are counted, of the policy's forwards alone. The tokenizer, a byte-level BPE, is trained
on the file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine
from datasets import Dataset
from end_to_end.data import read_rows, train_tokenizer
from rich.console import Console
from rich.table import Table
from trl.trainer.dpo_trainer import DataCollatorForPreference

from fastdpo.data import PreferenceCollator, prepare
from fastdpo.model.padded_parts import ACCELERATOR_FORWARD_COST, FORWARD_COST
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import model_inputs

BATCHES = (2, 4, 8, 16, 32)
VOCABULARY = 16_000


def count(rows: list[dict[str, list[int]]], pairs: int, max_length: int) -> dict[str, dict[str, int]]:
    """Of an epoch in batches of so many pairs: what a batch is made by -> ``tokens``, and ``forwards``.

    ``sequences`` are the tokens of all sequences without padding, each with its prompt, in a forward of its own.
    """
    padded = PreferenceCollator(pad_token_id=0, max_length=max_length)
    collators: dict[str, Any] = {
        "TRL": DataCollatorForPreference(pad_token_id=0, max_length=max_length),
        "fastdpo, padded, on a GPU": RowCollator("padded", padded, forward_cost=ACCELERATOR_FORWARD_COST),
        "fastdpo, padded, on a CPU": RowCollator("padded", padded, forward_cost=FORWARD_COST["cpu"]),
        "fastdpo, repeated": RowCollator("repeated", padded),
        "fastdpo, shared": RowCollator("shared", padded),
    }
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    batches = [[rows[i] for i in order[begin : begin + pairs]] for begin in range(0, len(rows), pairs)]
    tokens = sum(int(padded(batch)["attention_mask"].sum()) for batch in batches)
    found = {"sequences": {"tokens": tokens, "forwards": 2 * len(rows)}}
    for name, collate in collators.items():
        forwards = [ids.numel() for batch in batches for ids in model_inputs(collate(batch))]
        found[name] = {"tokens": sum(forwards), "forwards": len(forwards)}
    return found


def table_of(counts: dict[int, dict[str, dict[str, int]]]) -> Table:
    """Tokens, as multiples of those of sequences without padding, and forwards a batch of TRL's."""
    table = Table("pairs a batch", *(str(pairs) for pairs in counts), box=None)
    first = next(iter(counts.values()))
    table.add_row("sequences, tokens", *(f"{found['sequences']['tokens']:,}" for found in counts.values()))
    for name in list(first)[1:]:
        cells = []
        for found in counts.values():
            share = found[name]["tokens"] / found["sequences"]["tokens"]
            forwards = found[name]["forwards"] / found["TRL"]["forwards"]
            cells.append(f"{share:.2f} x in {forwards:.1f}")
        table.add_row(name, *cells)
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="preference pairs, in JSON lines; by default made-up ones")
    parser.add_argument("--max_length", type=int, default=1024, help="most tokens of a sequence; default: 1024")
    parser.add_argument("--json", type=Path, help="every count, machine, versions, commit")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    report = machine.facts_of_run(sys.argv if arguments is None else ["bench/padding.py", *arguments], "cpu")
    texts = read_rows(args.data, args.max_length)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(texts, VOCABULARY, Path(folder) / "tokenizer.json")
        prepared, _ = prepare(Dataset.from_list(texts), tokenizer, max_length=args.max_length)
    rows = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in prepared]
    counts = {pairs: count(rows, pairs, args.max_length) for pairs in BATCHES}
    console = Console(highlight=False)
    console.print(
        f"{args.data.name if args.data else 'made-up pairs'}: {len(rows)} pairs, at most {args.max_length:,} tokens"
    )
    console.print(table_of(counts))
    console.print("tokens, as multiples of those of sequences without padding, in so many forwards for each of TRL's")
    if args.json:
        args.json.write_text(json.dumps(report | {"counts": counts}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
