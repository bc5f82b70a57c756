"""Nothing but our own words on the screen: what each command prints to stderr, end to end on a tiny model.

The demo's own test looks at its.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from toy_data import text_rows, write_jsonl

from fastdpo.commands.quiet import hush_other_libraries

# One process, since each would wait for the same imports; a line on stderr tells whose turn it is.
COMMANDS_ONE_BY_ONE = """
import json, sys
from fastdpo.commands.cli import main
for name, words in json.loads(sys.argv[1]).items():
    print(f"\\x1e{name}", file=sys.stderr, flush=True)
    code = main(words)
    if code:
        print(f"exit code {code}", file=sys.stderr, flush=True)
"""
NAMES = ("check-data", "train", "train, 4 bits", "cache-ref", "compare", "chat", "info")


@pytest.fixture(scope="module")
def printed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name of a command -> its stderr."""
    folder = tmp_path_factory.mktemp("quiet")
    pairs = write_jsonl(folder / "pairs.jsonl", text_rows(8))
    source = ["--model_name_or_path", str(model)]
    data = ["--dataset_name", str(pairs), "--use_cpu", "--max_length", "128", "--report_to", "none"]
    lora = ["--use_peft", "--max_steps", "2", "--per_device_train_batch_size", "2", "--output_dir"]
    words = {
        "check-data": ["check-data", str(pairs), *source],
        "train": ["train", *source, *data, *lora, f"{folder}/lora", "--eval_strategy", "steps", "--eval_steps", "1",
                  "--dataset_test_split", "train", "--save_steps", "1"],
        "train, 4 bits": ["train", *source, *data, *lora, f"{folder}/qlora", "--load_in_4bit"],
        "cache-ref": ["cache-ref", *source, *data, "--disable_tqdm", "--ref_cache", f"{folder}/ref"],
        "compare": ["compare", "--model", f"{folder}/lora", "--prompt", "The sky", "--max_new_tokens", "4"],
        "chat": ["chat", "--model", str(model), "--max_new_tokens", "4"],
        "info": ["info"],
    }  # fmt: skip
    assert tuple(words) == NAMES
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS_ONE_BY_ONE, json.dumps(words)],
        input="The sky over\n",
        capture_output=True,
        text=True,
        timeout=300,
        # Bars are ours, or tell of work that is being done.
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")},
    )
    turns = dict(turn.split("\n", 1) for turn in done.stderr.split("\x1e")[1:])
    assert done.returncode == 0 and tuple(turns) == NAMES, done.stderr
    return turns


@pytest.mark.parametrize("command", NAMES)
def test_no_line_of_another_library_is_printed(command: str, printed: dict[str, str]) -> None:
    if command == "train, 4 bits":
        pytest.importorskip("bitsandbytes")
    assert printed[command] == ""


def test_what_is_filtered_is_named(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        hush_other_libraries()
        hush_other_libraries()
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "No module")
        logger.warning("Failed to load %s", "something else")
        for name in ("is_gradient_checkpointing", "past_key_values"):
            warnings.warn(f"`{name}` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated", UserWarning, stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == ["Failed to load something else"]
    assert [(w.category, "past" in str(w.message)) for w in warned] == [(FutureWarning, True), (UserWarning, False)]
