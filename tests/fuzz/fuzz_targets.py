"""What the readers are asked in one run of the fuzzer.

Only UsageError and InputError may leave a reader. What is read is held against the standard library's reading of it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import yaml
from fuzz_values import COLUMNS, Source

from fastdpo.commands.flags import TrainParser
from fastdpo.commands.launching import LaunchAskedError
from fastdpo.commands.pairs import columns_of, parts_of
from fastdpo.commands.prompts import read_prompts
from fastdpo.data.columns import check_columns
from fastdpo.data.formats.convert import convert
from fastdpo.data.reading.opening import DataFile
from fastdpo.data.reading.read import How, read_files
from fastdpo.data.reading.rows import rows_of
from fastdpo.data.row_digests import rows_fingerprint
from fastdpo.errors import InputError, UsageError
from fastdpo.ref_cache.files import COMPLETIONS, LOGPS, MANIFEST, RefCache
from fastdpo.ref_cache.key import CacheKey
from fastdpo.report.snapshot import Snapshot
from fastdpo.trainer import checkpoints
from fastdpo.trainer.manifest import MANIFEST_FILE, read_manifest, write_manifest

ROOM = Path(tempfile.mkdtemp(prefix="fastdpo-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.compress(raw, 1),
    ".bz2": lambda raw: bz2.compress(raw, 1),
    ".xz": lambda raw: lzma.compress(raw, preset=0),
    ".zst": lambda raw: raw,  # no standard library writes it: the bytes are none
}


def _file(name: str, content: bytes) -> Path:
    path = ROOM / name
    path.write_bytes(content)
    return path


def _same(a: Any, b: Any) -> bool:
    """Equal in type and value, a NaN to a NaN, and keys in the same order."""
    return repr(a) == repr(b)


def _as_json_says(text: bytes) -> list[Any] | None:
    """The lines' values; None where one is not JSON, or no object."""
    rows = []
    try:
        for line in text.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
            if line.strip():
                rows.append(json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError):
        return None
    return rows if all(isinstance(row, dict) for row in rows) else None


def lines(source: Source) -> None:
    """JSON lines, whole or compressed, from text of any kind or from rows a little spoilt."""
    kind = source.one_of(("jsonl", "jsonl", "json"))
    if source.flag():
        text = source.rest()
    else:
        rows = [source.row() for _ in range(1 + source.index(3))]
        if kind == "json" and source.flag():
            text = source.json_text(rows)
        else:
            text = source.one_of((b"\n", b"\r\n", b"\n\n")).join(map(source.json_text, rows))
        text = source.spoilt(text)
    compression = source.one_of(("", "", "", *COMPRESSIONS))
    raw = COMPRESSIONS[compression](text)
    path = _file(f"rows.{kind}{compression}", source.spoilt(raw) if compression and source.flag() else raw)
    try:
        found = [row for _, row in rows_of(DataFile.at(path))]
    except InputError:
        return
    if compression:
        return
    if text.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        assert _same(found, json.loads(text.decode("utf-8-sig"))), text
    else:
        assert _same(found, _as_json_says(text)), text


def tables(source: Source) -> None:
    """CSV and TSV: what is no list of messages is the text that stands there."""
    kind = source.one_of(("csv", "tsv"))
    comma = "," if kind == "csv" else "\t"
    if source.flag():
        text = source.rest()
    else:
        written = io.StringIO()
        names = [source.one_of(COLUMNS) for _ in range(1 + source.index(4))]
        rows = [[_cell(source) for _ in names] for _ in range(1 + source.index(3))]
        csv.writer(written, delimiter=comma, lineterminator=source.one_of(("\n", "\r\n"))).writerows([names, *rows])
        text = source.spoilt(written.getvalue().encode("utf-8", "replace"))
    try:
        found = [row for _, row in rows_of(DataFile.at(_file(f"rows.{kind}", text)))]
    except InputError:
        return
    plain = list(csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""), delimiter=comma, strict=True))
    names, *rows = [cells for cells in plain if cells] or [[]]
    assert len(rows) == len(found), text
    for cells, row in zip(rows, found, strict=True):
        assert list(row) == names, text
        assert all(value == cell for value, cell in zip(row.values(), cells, strict=True) if isinstance(value, str)), (
            text
        )


_LITERALS = ("{[]: 1}", "{1, 2}", "(1,)", "'\\ud800'", "b'x'", "...", "1j", "{(1,): 2}", "9" * 5000, "-" * 900)


def _cell(source: Source) -> str:
    if source.flag(3):
        return source.text()
    value = source.value() if source.flag(3) else [{"role": "user", "content": source.value(2)}]
    written = repr(value) if source.flag() else json.dumps(value)
    if source.flag(3):
        at = source.index(len(written) + 1)
        written = written[:at] + source.one_of(_LITERALS) + written[at + source.index(9) :]
    return written


def formats(source: Source) -> None:
    """Rows of all formats to pairs."""
    name, rows = source.rows()
    columns = {source.one_of(COLUMNS): source.one_of(COLUMNS)} if source.flag(8) else None
    places = ((f"line {i}", row) for i, row in enumerate(rows, 1))
    try:
        for pair in convert(places, "rows.jsonl", format=name, columns=columns, facts=[]):
            assert isinstance(pair, dict)
    except InputError:
        return


def whole(source: Source) -> None:
    """A file to a dataset on the disk, as a training begins with it."""
    name, rows = source.rows()
    text = b"\n".join(json.dumps(row).encode() for row in rows)
    path = _file("whole.jsonl", text)
    try:
        dataset = read_files([DataFile.at(path)], How(name))
        check_columns(dataset, str(path))
        assert len(list(dataset)) == len(dataset)
    except InputError:
        pass
    finally:
        for kept in (ROOM / "cache/fastdpo").glob("*"):
            kept.unlink()


def prompts(source: Source) -> None:
    """Lists of prompts."""
    kind = source.one_of(("txt", "jsonl", "jsonl", "json", "csv"))
    if source.flag():
        text = source.rest()
    else:
        text = source.spoilt(b"\n".join(source.json_text(source.row(COLUMNS)) for _ in range(1 + source.index(3))))
    try:
        read_prompts(_file(f"prompts.{kind}", text))
    except InputError:
        pass
    finally:
        for kept in (ROOM / "cache/fastdpo").glob("*"):
            kept.unlink()


_PARSER: list[TrainParser] = []


def configuration(source: Source) -> None:
    """``--config FILE`` of YAML, and what flags say of pairs."""
    parser = (_PARSER or _PARSER.append(TrainParser()) or _PARSER)[0]  # type: ignore[func-returns-value]
    names = sorted(parser._names())
    if source.flag(3):
        text = source.rest()
    else:
        values = {source.one_of((*names, "env", "datasets", "columns", "beta")): _setting(source) for _ in range(3)}
        text = source.spoilt(yaml.dump(values, allow_unicode=True).encode("utf-8", "replace"))
    quiet = io.StringIO()
    with patch.dict(os.environ), redirect_stdout(quiet), redirect_stderr(quiet):
        try:
            script, *_ = parser.read(["--config", str(_file("run.yaml", text))])
            columns_of(script.columns)
            parts_of(script.datasets or [])
        except (UsageError, InputError, LaunchAskedError):
            return


def _setting(source: Source) -> Any:
    if source.flag(6):
        import datetime

        return source.one_of(
            (datetime.date(2001, 1, 1), {1, 2}, b"bytes", {"a": datetime.date(2001, 1, 1)}, {1: {2: 3}})
        )
    return source.value(2)


_DIGESTS = np.arange(48, dtype=np.uint8).reshape(3, 16)
_KEY = CacheKey(
    weights="ab" * 32,
    config={"model_type": "llama", "vocab_size": 9},
    weights_dtype="float32",
    compute_dtype="float32",
    tokenizer="cd" * 32,
    chat_template="ef" * 32 + ", on 2026-01-01",
    max_length=10,
    truncation_mode="keep_start",
    masking="m",
    num_completions=3,
    completions=rows_fingerprint(_DIGESTS),
)


def cache(source: Source) -> None:
    """A reference cache whose manifest or tensors were changed."""
    folder = ROOM / "cache_of_reference"
    here = RefCache(folder)
    folder.mkdir(exist_ok=True)
    here.begin(_KEY, _DIGESTS, {"model": "m"})
    here.write_part(_KEY, np.arange(3), np.zeros(3, np.float32))
    here.finish(_KEY, {"model": "m"})
    manifest = json.loads((folder / MANIFEST).read_text())
    for _ in range(source.index(3)):
        inside = manifest["key"] if source.flag() and isinstance(manifest.get("key"), dict) else manifest
        key = source.one_of((*sorted(inside), "new")) if inside else "new"
        if source.flag(3):
            inside.pop(key, None)
        else:
            inside[key] = source.value(2)
    text = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(source.rest() if source.flag(8) else source.spoilt(text))
    if source.flag(3):
        torn = folder / source.one_of((COMPLETIONS, LOGPS))
        torn.write_bytes(source.spoilt(torn.read_bytes()))
    asked = CacheKey(**(asdict(_KEY) | {source.one_of(("weights", "tokenizer", "max_length")): "other"}))
    try:
        here.manifest()
        here.check(source.one_of((_KEY, asked)), _DIGESTS)
        assert here.load().shape == (3,)
    except InputError:
        return


def states(source: Source) -> None:
    """What a run left in its folder: its state, and the record of its start."""
    folder = ROOM / "run"
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir(parents=True, exist_ok=True)
    state = {"global_step": 3, "max_steps": 9, "epoch": 1.5, "log_history": [{"loss": 0.5}]}
    for _ in range(source.index(3)):
        state[source.one_of(sorted(state))] = source.value(2)
    text = source.rest() if source.flag(4) else source.spoilt(source.json_text(state))
    (checkpoint / "trainer_state.json").write_bytes(text)
    (folder / "trainer_state.json").write_bytes(source.spoilt(text))
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).touch()
    manifest = write_manifest(checkpoint)  # of what is there, be it nonsense
    if source.flag(3):
        path = checkpoint / MANIFEST_FILE
        path.write_bytes(source.rest() if source.flag() else source.spoilt(path.read_bytes()))
        assert read_manifest(checkpoint) in (None, manifest)
    try:
        found = checkpoints.find_checkpoints(folder)
        checkpoints.find_torn(folder)
        checkpoints.resolve_resume(source.one_of(("last", "true", str(checkpoint), str(folder))), folder)
        for each in found:
            checkpoints.refuse_damaged(each)  # which a run does before it asks the rest
            checkpoints.is_end(each, max_steps=5, num_train_epochs=2.0)
            checkpoints.is_end(each, max_steps=-1, num_train_epochs=2.0)
            checkpoints.came_from(folder, each)
    except (UsageError, InputError):
        pass
    start = Snapshot("key", 0, source.text(), [source.one_of((0.5, -0.0, 1e308))], [0.5])
    path = folder / "report_start.json"
    start.save(path)
    if source.flag(3):
        path.write_bytes(text if source.flag() else source.spoilt(path.read_bytes()))
    try:
        assert repr(Snapshot.load(path)) == repr(start)
    except (ValueError, TypeError, KeyError):  # which is what it says
        return


TARGETS: dict[str, Callable[[Source], None]] = {
    each.__name__: each for each in (lines, tables, formats, whole, prompts, configuration, cache, states)
}
