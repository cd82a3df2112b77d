"""Rows of a unit on their way to the disk, in pieces that any thread may do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePath

import zarr
from torch import Tensor

from streamfisher.data.batches import Unit
from streamfisher.store import codecs
from streamfisher.store.chunks import ChunkWriter
from streamfisher.store.folder import RunFolder
from streamfisher.store.integrity import digest_of_ends
from streamfisher.store.names import node_name

#: Bytes of one piece of writing, about.
_PIECE = 16 << 20


class UnitWriting:
    """The rows of one unit on their way to the disk.

    Args:
        run: the folder.
        unit: the samples.
        rows: parameter -> (len(unit), P_k) on the CPU; not to change before all is written.
        ready: returns when they are there.
    """

    def __init__(
        self, run: RunFolder, unit: Unit, rows: Mapping[str, Tensor], ready: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.unit, self.rows, self.ready = run, unit, rows, ready
        self.bitround = run.manifest.layout["bitround"]
        self._ends: dict[str, dict[PurePath, bytes]] = {name: {} for name in rows}
        self._checksums: dict[str, int] = {}
        self._writers: dict[int, ChunkWriter] = {}  # columns of a chunk -> what writes them
        codec = run.manifest.layout["codec"]
        for name in rows:
            columns = self._array(name).chunks[1]
            self._writers.setdefault(columns, ChunkWriter((run.chunk_rows, columns), run.store_dtype, codec))

    def jobs(self) -> Iterator[tuple[Callable[[], None], int]]:
        """Yield pieces of work, and the bytes that each writes."""
        some: list[str] = []
        size = 0
        for name, rows in self.rows.items():
            stored = rows.numel() * self.run.store_dtype.itemsize
            if stored >= _PIECE:
                yield partial(self._note, name), 0
                chunks = self._chunks(name)
                yield from ((partial(self._write, name, index), stored // chunks) for index in range(chunks))
                continue
            some.append(name)
            size += stored
            if size >= _PIECE:
                yield partial(self._write_some, tuple(some)), size
                some, size = [], 0
        if some:
            yield partial(self._write_some, tuple(some)), size

    @property
    def checksums(self) -> dict[str, int]:
        """Return the CRC-32C of each parameter's stored values, once all is written."""
        return {name: self._checksums[name] for name in self.rows}

    @property
    def digests(self) -> dict[str, int]:
        """Return the digest of each parameter's chunks, once all is written."""
        return {name: digest_of_ends(ends) for name, ends in self._ends.items()}

    def _write_some(self, names: Sequence[str]) -> None:
        for name in names:
            self._note(name)
            for index in range(self._chunks(name)):
                self._write(name, index)

    def _note(self, name: str) -> None:
        self.ready()
        self._checksums[name] = codecs.checksum(codecs.encode(self.rows[name], self.run.store_dtype, self.bitround))

    def _write(self, name: str, index: int) -> None:
        self.ready()
        width = self._array(name).chunks[1]
        values = self.rows[name][:, index * width : (index + 1) * width]
        stored = codecs.encode(values, self.run.store_dtype, self.bitround)
        folder = self.run.path / "gradients" / node_name(name)
        place, end = self._writers[width].write(folder, (self.unit.index, index), stored)
        self._ends[name][place.relative_to(f"c/{self.unit.index}")] = end

    def _chunks(self, name: str) -> int:
        array = self._array(name)
        return -(-array.shape[1] // array.chunks[1])

    def _array(self, name: str) -> zarr.Array:
        return self.run.array(f"gradients/{node_name(name)}")
