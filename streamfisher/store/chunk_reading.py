"""Chunks of an array, read and decoded in the calling thread: from the file to where they are wanted in one copy.

Through Zarr every chunk passes the one event loop of the process, and is put in its place there, so that threads that
read wait for one another (docs/design.md has the figures). What is checked is the same: regular files, of the size that
the chunks of the array have, whose CRC-32C is right.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from numcodecs import Blosc, Zstd

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.own_files import open_own, read_own
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.runtime.staging import staging_of
from streamfisher.store import codecs
from streamfisher.store.opening import ArrayFacts, largest_file, unpacked_size

#: Rows of a chunk are read one by one to where they belong if they have so many bytes.
_LONG_ROW = 16 << 10
#: Buffers of one system call.
_MOST_BUFFERS = 512
#: Chunks of a run on a store of objects that are asked for at a time.
_REQUESTS = 8


@dataclass(frozen=True)
class ChunkReader:
    """Reads parts of an array.

    Args:
        path: of the array's folder.
        facts: of its metadata.
        complete: a chunk that is missing is damage, and does not read as the fill value.
    """

    path: Path
    facts: ArrayFacts
    complete: bool = False

    def read_into(self, where: tuple[slice, ...], out: np.ndarray) -> np.ndarray:
        """Read a part of the array into `out`, which has its shape and the stored dtype, and return it.

        Args:
            where: a slice for each axis, with both ends, in order.
            out: what is filled.

        Raises:
            CorruptRunError: a chunk is missing where none may be, or of another size.
            ValueError: a chunk fails its checksum.
            RuntimeError: it cannot be unpacked.
            OSError: it cannot be read.
        """
        spans = [
            range(part.start // size, -(-part.stop // size)) if part.stop > part.start else range(0)
            for part, size in zip(where, self.facts.chunks, strict=True)
        ]

        def read(index: tuple[int, ...]) -> None:
            inside, target = [], []
            for part, size, place in zip(where, self.facts.chunks, index, strict=True):
                start, stop = max(part.start, place * size), min(part.stop, (place + 1) * size)
                inside.append(slice(start - place * size, stop - place * size))
                target.append(slice(start - part.start, stop - part.start))
            self._read(index, tuple(inside), out[tuple(target)])

        if isinstance(self.path, RemotePath) or staging_of(self.path) is not None:
            with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="request") as requests:
                list(requests.map(read, itertools.product(*spans)))
        else:
            for index in itertools.product(*spans):
                read(index)
        return out

    def _read(self, index: tuple[int, ...], inside: tuple[slice, ...], out: np.ndarray) -> None:
        """Read the part `inside` of a chunk into `out`."""
        path = self.path / "/".join(("c", *map(str, index)))
        try:
            if self.facts.codec == "crc32c" and self._scattered(inside, out) and is_here(path):
                self._read_rows(path, out)
            else:
                out[...] = self._decoded(path)[inside]
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            if self.complete:
                raise CorruptRunError(f"{path} is missing.") from None
            out[...] = self.facts.fill

    def _scattered(self, inside: tuple[slice, ...], out: np.ndarray) -> bool:
        """Return whether all columns of a chunk are wanted, so that its rows can be read to where they belong."""
        whole = all(part == slice(0, size) for part, size in zip(inside[1:], self.facts.chunks[1:], strict=True))
        return (
            whole
            and inside[0].start == 0
            and out.ndim == 2
            and out[:1].flags.c_contiguous
            and out[:1].nbytes >= _LONG_ROW
        )

    def _read_rows(self, path: Path, out: np.ndarray) -> None:
        """Read the first rows of a chunk that nothing packs, and check all of it."""
        size = self.facts.chunk_bytes
        with os.fdopen(open_own(path, os.O_RDONLY), "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != size + 4:
                raise self._other_size(path)
            beyond = np.empty(size - out.nbytes, dtype=np.uint8)  # rows of the chunk that the array does not have
            rows = [row.view(np.uint8) for row in out]
            checksum = 0
            for first in range(0, len(rows), _MOST_BUFFERS):
                checksum = _fill(file.fileno(), rows[first : first + _MOST_BUFFERS], checksum, path)
            checksum = _fill(file.fileno(), [beyond], checksum, path)
            if os.read(file.fileno(), 4) != checksum.to_bytes(4, "little"):
                raise ValueError(f"{path} does not have its checksum")

    def _decoded(self, path: Path) -> np.ndarray:
        """Return a chunk whole, unpacked and checked."""
        content = read_own(path, largest_file(self.facts.chunk_bytes))
        if unpacked_size(content, self.facts.codec) != self.facts.chunk_bytes:
            raise self._other_size(path)
        packed = np.frombuffer(content, dtype=np.uint8)[:-4]
        if google_crc32c.value(packed).to_bytes(4, "little") != content[-4:]:
            raise ValueError(f"{path} does not have its checksum")
        if self.facts.codec != "crc32c":
            decoder = Blosc() if self.facts.codec == "blosc" else Zstd()
            packed = decoder.decode(packed)
        return np.frombuffer(packed, dtype=self.facts.dtype).reshape(self.facts.chunks)

    def _other_size(self, path: Path) -> CorruptRunError:
        return CorruptRunError(f"{path} is not a chunk of {self.facts.chunk_bytes:,} bytes, as those of its array are.")


def is_here(path: Path) -> bool:
    """Return whether a file is one of this machine, and not at a store."""
    return not isinstance(path, RemotePath) and (staging_of(path) is None or path.exists())


def read_decoded(reader: ChunkReader, rows: slice, columns: slice, dtype: torch.dtype, out: np.ndarray) -> np.ndarray:
    """Read rows that are stored as `dtype` into `out`, float32 or float64 as `codecs.decode` returns, and return it."""
    if reader.facts.dtype == out.dtype:
        return reader.read_into((rows, columns), out)
    stored = np.empty(out.shape, dtype=reader.facts.dtype)
    return codecs.decode(reader.read_into((rows, columns), stored), dtype, out)


def _fill(file: int, buffers: list[np.ndarray], checksum: int, path: Path) -> int:
    """Fill buffers with what comes next in a file and return the checksum with it."""
    wanted = sum(buffer.nbytes for buffer in buffers)
    found = os.readv(file, [buffer.data for buffer in buffers])
    for buffer in buffers:
        filled = min(found, buffer.nbytes)
        found -= filled
        while filled < buffer.nbytes:  # a call gives at most 2 GiB, and some filesystems less
            more = os.readv(file, [buffer[filled:].data])
            if not more:
                raise ValueError(f"{path} ends before its {wanted:,} bytes")
            filled += more
        checksum = google_crc32c.extend(checksum, buffer)
    return checksum
