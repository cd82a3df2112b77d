"""Records of a file, one a sample: JSON lines, compressed or not, Parquet and Arrow."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from streamfisher.data.tokenizing import TextEncoder
from streamfisher.errors import DataError, require

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TABLES = (".parquet", ".arrow", ".feather")


def is_of_records(path: Path) -> bool:
    """Return whether a file holds records, by its name."""
    return path.name.lower().endswith((*JSON_LINES, *TABLES))


def read_records(
    path: Path, encode: TextEncoder, field: str, max_length: int | None
) -> tuple[list[dict[str, Tensor]], dict[str, list[float]]]:
    """Return a sample of each record, token ids alone, and the numbers that every record has.

    These are no part of the samples: whatever a record calls them, the model must not take them for an input.

    Args:
        path: `.jsonl`, also with `.gz` or `.zst`, `.parquet`, `.arrow` or `.feather`.
        encode: text to token ids; a list of integers is taken as ids.
        field: that holds the text.
        max_length: tokens; longer texts are cut.

    Returns:
        `{"input_ids": (T,) int64}` of each record; and name -> a number of each record.

    Raises:
        DataError: the file cannot be read, or a record has no text or ids there; the message says which.
        MissingExtraError: pyarrow is needed and not installed.
    """
    return samples_of_records(_records(path), encode, field, max_length)


def samples_of_records(
    records: Iterable[tuple[str, Any]], encode: TextEncoder, field: str, max_length: int | None
) -> tuple[list[dict[str, Tensor]], dict[str, list[float]]]:
    """Return what `read_records` does, of records that are at hand, each with where it stands in words."""
    samples: list[dict[str, Tensor]] = []
    numbers: dict[str, list[float]] = {}
    for where, record in records:
        ids = _ids(record, field, encode, where)
        found = {key: float(value) for key, value in record.items() if key != field and _is_number(value)}
        if not samples:
            numbers = {key: [] for key in sorted(found)}
        numbers = {key: values for key, values in numbers.items() if key in found}
        for key, values in numbers.items():
            values.append(found[key])
        samples.append({"input_ids": ids[:max_length]})
    return samples, numbers


def _ids(record: Any, field: str, encode: TextEncoder, where: str) -> Tensor:
    if not isinstance(record, dict) or field not in record:
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: there is no field {field!r} (there is: {keys}); use --field.")
    value = record[field]
    if not isinstance(value, str) and not (isinstance(value, list) and all(type(id) is int for id in value)):
        raise DataError(f"{where}: {field!r} is neither text nor token ids; use --field.")
    if isinstance(value, str):  # half a surrogate pair is no text, as bytes that are no UTF-8 are none
        value = encode(value.encode("utf-8", errors="replace").decode())
    try:
        return torch.tensor(value, dtype=torch.int64)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise DataError(f"{where}: a token id does not fit into 64 bits.") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield where a record stands, in words, and the record."""
    if path.name.lower().endswith(TABLES):
        for number, record in enumerate(_rows(path)):
            yield f"DATA {path}, row {number}", record
        return
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"DATA {path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, numbers too long, brackets too deep
                reason = "nested too deeply" if isinstance(error, RecursionError) else error
                raise DataError(f"DATA {path}, line {number}: not JSON ({reason}).") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    name = path.name.lower()
    try:
        if name.endswith(".zst"):
            require("pyarrow", "tables", f"read {path}")
            import pyarrow

            with pyarrow.input_stream(str(path), compression="zstd") as stream:
                yield io.TextIOWrapper(stream, encoding="utf-8", errors="replace")
        else:
            with (gzip.open if name.endswith(".gz") else open)(path, "rt", encoding="utf-8", errors="replace") as file:
                yield file
    except (OSError, EOFError) as error:
        raise DataError(f"DATA {path} cannot be read: {error}") from error


def _rows(path: Path) -> Iterator[Any]:
    require("pyarrow", "tables", f"read {path}")
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if path.name.lower().endswith(".parquet"):
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
            return
        try:
            table = ipc.open_file(str(path)).read_all()
        except pyarrow.ArrowInvalid:  # a stream, as the package datasets writes it
            with pyarrow.memory_map(str(path)) as source:
                table = ipc.open_stream(source).read_all()
        for batch in table.to_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"DATA {path} cannot be read: {error}") from error
