"""Factors of a batch on their way to the disk, in pieces that any thread may do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamfisher.config import Codec, dtype_name
from streamfisher.gradients.factors import BatchFactors
from streamfisher.store import codecs
from streamfisher.store.arrays import array_metadata, write_whole
from streamfisher.store.chunks import ChunkWriter
from streamfisher.store.integrity import digest_of_ends
from streamfisher.store.names import node_name

_CHUNK_COLUMNS = 1024
_CHUNK_BYTES = 16 << 20


class FactorWriting:
    """The factors of one batch on their way into a wave's folder.

    Args:
        folder: of the wave.
        unit: index of the unit.
        batch: of the batch in the unit.
        start: the batch's first sample.
        packed: on the CPU; not to change before all is written.
        codec: of the values.
        ready: returns when the tensors are there.
        direct: past the page cache.
    """

    def __init__(
        self,
        folder: Path,
        unit: int,
        batch: int,
        start: int,
        packed: BatchFactors,
        codec: Codec,
        ready: Callable[[], None] = lambda: None,
        *,
        direct: bool = False,
    ) -> None:
        self.direct = direct
        self.folder, self.name, self.start, self.codec, self.ready = (
            folder,
            f"{unit:06d}-{batch:04d}",
            start,
            codec,
            ready,
        )
        self.size = sum(4 * t.numel() if t.dim() == 1 else t.nbytes for t in packed.tensors.values())  # as stored
        self._tensors = dict(packed.tensors)  # those that are not written yet
        self._lengths, self._pairs = packed.lengths, packed.pairs
        self._sides: dict[str, dict[str, Any]] = {key: {} for key in packed.tensors}

    def jobs(self) -> Iterator[tuple[Callable[[], None], int]]:
        """Yield pieces of work, and the bytes that each writes."""
        for key, tensor in list(self._tensors.items()):
            yield functools.partial(self._write, key), tensor.nbytes

    def entry(self) -> dict[str, Any]:
        """Return what the unit's marker must say of the batch, once all is written."""
        pairs = {name: [list(pair) for pair in uses] for name, uses in self._pairs.items()}
        return {"start": self.start, "bytes": self.size, "sides": self._sides, "pairs": pairs}

    def _write(self, key: str) -> None:
        self.ready()
        tensor = self._tensors[key]
        dtype = None if tensor.dim() == 1 else tensor.dtype
        stored = tensor.to(torch.int32).numpy() if dtype is None else codecs.encode(tensor, dtype)
        path = self.folder / node_name(key) / self.name
        self._sides[key] = {
            "shape": list(stored.shape),
            "dtype": None if dtype is None else dtype_name(dtype),
            "lengths": list(self._lengths[key]),
            "crc32c": codecs.checksum(stored),
            "chunks": _write_array(path, stored, dtype, self.codec, self.direct)
            if stored.shape[0]
            else digest_of_ends({}),
        }
        del self._tensors[key]


def write_factors(
    folder: Path, unit: int, batch: int, start: int, packed: BatchFactors, codec: Codec
) -> dict[str, Any]:
    """Write a batch's factors and return what the unit's marker must say of them: `FactorWriting`, all at once."""
    writing = FactorWriting(folder, unit, batch, start, packed, codec)
    for job, _ in writing.jobs():
        job()
    return writing.entry()


def _write_array(path: Path, stored: np.ndarray, dtype: torch.dtype | None, codec: Codec, direct: bool) -> int:
    """Write an array instead of any that was there; return the digest of its files."""
    columns = min(stored.shape[1], _CHUNK_COLUMNS) if stored.ndim > 1 else 1
    rows = max(1, min(stored.shape[0], _CHUNK_BYTES // (columns * stored.itemsize)))
    chunk = (rows, columns)[: stored.ndim]
    codec = "zstd" if dtype is None else codec
    metadata = _metadata(stored.shape, chunk, dtype, codec)
    return write_whole(path, stored, ChunkWriter(chunk, dtype, codec, direct=direct), metadata)


@functools.lru_cache(maxsize=256)
def _metadata(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: torch.dtype | None, codec: Codec) -> bytes:
    attributes = {"logical_dtype": "token id" if dtype is None else dtype_name(dtype)}
    return array_metadata(shape, chunk, dtype, codec, ("position", "element")[: len(shape)], attributes)
