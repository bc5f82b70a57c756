"""Which files can be read, by their names, and their bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from fastdpo.data.terms import DataError, first_line

FILE_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BINARY = ("parquet", "arrow")  # compressed inside


@dataclass(frozen=True)
class DataFile:
    """One file of rows.

    Attributes:
        path: where its bytes are.
        name: what messages call it.
        format: one of the values of ``FILE_FORMATS``.
        compression: the extension of one of ``COMPRESSIONS``, or "".
    """

    path: Path
    name: str
    format: str
    compression: str = ""

    @classmethod
    def at(cls, path: Path, name: str | None = None) -> DataFile:
        """The file at ``path``, its format told by ``name`` (by default, the path).

        Raises:
            DataError: no format goes by the extension.
        """
        name = name or str(path)
        kind = format_of(name)
        if kind is None:
            raise DataError(f"{name}: unknown extension {Path(name).suffix or '(none)'!r}. {what_can_be_read()}")
        return cls(path, name, *kind)

    def open(self) -> BinaryIO:
        if self.compression == ".gz":
            return cast(BinaryIO, gzip.open(self.path, "rb"))
        if self.compression == ".bz2":
            return cast(BinaryIO, bz2.open(self.path, "rb"))
        if self.compression == ".xz":
            return cast(BinaryIO, lzma.open(self.path, "rb"))
        if self.compression == ".zst":
            return io.BufferedReader(pa.CompressedInputStream(str(self.path), "zstd"))
        return self.path.open("rb")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what libraries raise about the file's bytes into DataError."""
        try:
            yield
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            detail = first_line(str(error) or type(error).__name__)
            raise DataError(f"{self.name} cannot be read: {detail.rstrip('.')}.") from error


def format_of(name: str) -> tuple[str, str] | None:
    """(format, compression) by the extensions of a file's name; None if there is no reader for it."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    file_format = FILE_FORMATS.get("".join(suffixes[-1:]))
    if file_format is None or (compression and file_format in _BINARY):
        return None
    return file_format, compression


def what_can_be_read() -> str:
    return (
        f"Files with the extension {', '.join(FILE_FORMATS)} can be read, and those of text with one of "
        f"{', '.join(COMPRESSIONS)} behind it."
    )


def refuse_other_encodings(file: DataFile) -> None:
    """Name what a spreadsheet or a Windows editor may have written instead of UTF-8."""
    with file.open() as stream:
        start = stream.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(start) > 1 and start.count(0) * 2 >= len(start)):
        raise DataError(f"{file.name} is UTF-16 or UTF-32 text. Save the file as UTF-8.")
