"""How fast preference rows become token ids, and in how much memory: fastdpo beside TRL, from the same file.

    python bench/data.py                                          two tables
    python bench/data.py --rows 6000 --json data.json             and every round
    python bench/data.py --before ../fastdpo-of-last-month        and another checkout

Each round is a process of its own, and rounds of the arms take turns. Figures are medians over rounds, ratios those of
rounds that follow each other. What makes ids of rows that are read is timed (``fastdpo.data.prepare`` with all of its
checks; TRL's ``DPOTrainer._prepare_dataset``), each at its default of processes: by the clock, and in seconds of all
cores together, which others on the machine change less. Memory is what a process takes to read the file and to prepare
its rows: the most that it held at a time beyond what it had before, without pages of files, which the system takes back
when it needs them; the first table has it over the number of rows (Linux alone tells it).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

from common import machine

WORDS = ["the", "a", "of", "to", "harbour", "bread", "bridge", "river", "wood", "map", "warm", "seven", "how", "never"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Words of the prompt, of each answer, and whether the rows are message lists.
CASES = {"short chats": (20, 20, True), "short texts": (20, 20, False), "long prompts": (600, 60, True)}
MEMORY_CASE = "short chats"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6000, help="rows of the file that is timed (default: 6000)")
    parser.add_argument(
        "--memory-rows", type=int, nargs="*", default=[2000, 8000, 32000], help="rows of the files for the first table"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizer", help="a folder or Hub id; by default one of 8,000 entries is trained")
    parser.add_argument("--before", help="another checkout of fastdpo, built, to measure as well")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", nargs=3, metavar=("NAME", "FILE", "TOKENIZER"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.arm:
        print(json.dumps(measure(*args.arm)))
        return 0
    facts = machine.facts_of_run(sys.argv, "cpu")
    results: dict[str, Any] = {**facts, "times": [], "memory": []}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = args.tokenizer or make_tokenizer(Path(folder) / "tokenizer")
        file = Path(folder) / "rows.jsonl"
        for count in args.memory_rows:
            write_rows(file, count, *CASES[MEMORY_CASE])
            once = {arm: run(arm, file, tokenizer, args.before)["memory"] for arm in ("fastdpo", "trl")}
            results["memory"].append({"case": MEMORY_CASE, "rows": count, "MiB": once})
            save(results, args.json)
        if args.memory_rows:
            print(memory_table(results["memory"]), flush=True)
        for case in args.cases:
            write_rows(file, args.rows, *CASES[case])
            results["times"].append({"case": case, "rows": args.rows, "rounds": rounds(file, tokenizer, args)})
            save(results, args.json)
            print(table(results["times"][-1]), flush=True)
    if warning := machine.warn_of_load(facts["machine"]):
        print(warning)
    return 0


def save(results: dict[str, Any], path: Path | None) -> None:
    """What there is so far: a run that is stopped has measured something."""
    results["machine"]["load_at_the_end"] = os.getloadavg()[0]
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")


def rounds(file: Path, tokenizer: str, args: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    arms = ["fastdpo", "trl", *(["before"] if args.before else [])]
    return [{arm: run(arm, file, tokenizer, args.before) for arm in arms} for _ in range(args.rounds)]


def run(arm: str, file: Path, tokenizer: str, before: str | None) -> dict[str, float]:
    root = Path(__file__).resolve().parents[1] if arm != "before" else Path(before).resolve()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)])}
    name = "fastdpo" if arm == "before" else arm
    words = [sys.executable, __file__, "--arm", name, str(file), tokenizer]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arm}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(arm: str, file: str, tokenizer_name: str) -> dict[str, float]:
    """One round: rows a second, and MiB at the peak beyond what was there before."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache
        read, prepare = {"fastdpo": fastdpo_ways, "trl": trl_ways}[arm]()
        few = Path(cache) / "few.jsonl"
        with open(file) as lines:
            few.write_text("".join(islice(lines, 8)))
        prepare(read(str(few)), tokenizer)  # imports, and compiles the template
        with PeakOfOwnMemory() as peak:
            rows = read(file)
            start, used = time.perf_counter(), time.process_time()
            kept = prepare(rows, tokenizer)
            seconds, used = time.perf_counter() - start, time.process_time() - used
    assert kept == len(rows), f"{arm} kept {kept} of {len(rows)} rows"
    return {"rows_a_second": len(rows) / seconds, "rows_a_core_second": len(rows) / used, "memory": peak.beyond}


def fastdpo_ways() -> tuple[Any, Any]:
    from fastdpo import data
    from fastdpo.data import prepare

    # An older checkout read files by way of datasets.
    read = getattr(data, "load_preferences", read_by_datasets)
    return read, lambda rows, tokenizer: len(prepare(rows, tokenizer, max_length=None)[0])


def trl_ways() -> tuple[Any, Any]:
    from types import SimpleNamespace

    from trl import DPOTrainer

    def prepare(rows: Any, tokenizer: Any) -> int:
        trainer = SimpleNamespace(_tokenizer=tokenizer)
        options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
        return len(DPOTrainer._prepare_dataset(trainer, rows, tokenizer, options, "train"))

    return read_by_datasets, prepare


def read_by_datasets(file: str) -> Any:
    import datasets

    return datasets.load_dataset("json", data_files=file, split="train", cache_dir=datasets.config.HF_DATASETS_CACHE)


class PeakOfOwnMemory:
    """The most memory of its own that the process holds within the block, looked at fifty times a second.

    Attributes:
        beyond: MiB, beyond what it held at the beginning.
    """

    def __enter__(self) -> PeakOfOwnMemory:
        gc.collect()
        self._first = self._most = _own_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self._most = max(self._most, _own_memory())

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self.beyond = max(self._most, _own_memory()) - self._first


def _own_memory() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024


def write_rows(path: Path, count: int, prompt: int, answer: int, chat: bool) -> Path:
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    with path.open("w") as file:
        for number in range(count):
            row = {"prompt": f"{number} {text(prompt)}", "chosen": text(answer), "rejected": text(answer)}
            if chat:
                roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
                row = {name: [{"role": roles[name], "content": said}] for name, said in row.items()}
            file.write(json.dumps(row) + "\n")
    return path


def make_tokenizer(folder: Path) -> str:
    """A byte-level BPE of 8,000 entries over texts like these."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(1)
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((" ".join(rng.choices(WORDS, k=30)) for _ in range(2000)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def memory_table(results: list[dict[str, Any]]) -> str:
    lines = [f"MiB to read and prepare, {MEMORY_CASE}"]
    for result in results:
        arms = "".join(f"   {arm} {most:5,.0f}" for arm, most in result["MiB"].items())
        lines.append(f"  {result['rows']:9,} rows{arms}")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['case']}, {result['rows']:,} rows"]
    rounds = result["rounds"]
    for arm in rounds[0]:
        wall, cores, memory = (
            statistics.median(once[arm][name] for once in rounds)
            for name in ("rows_a_second", "rows_a_core_second", "memory")
        )
        line = f"  {arm:8} {wall:9,.0f} rows/s {cores:9,.0f} rows/core-s {memory:8,.0f} MiB"
        if arm != "fastdpo":
            ratios = [
                statistics.median(once["fastdpo"][name] / once[arm][name] for once in rounds)
                for name in ("rows_a_second", "rows_a_core_second")
            ]
            line += f"   fastdpo: {ratios[0]:.1f} x by the clock, {ratios[1]:.1f} x a core"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
