"""Rows of a unit on their way to the disk, in pieces that any thread may do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePath

import torch
from torch import Tensor

from streamfisher.data.batches import Unit
from streamfisher.store import codecs
from streamfisher.store.chunks import ChunkWriter
from streamfisher.store.folder import RunFolder
from streamfisher.store.integrity import digest_of_ends

#: Bytes of one piece of writing, about.
_PIECE = 16 << 20


class UnitWriting:
    """The rows of one unit on their way to the disk.

    Args:
        run: the folder.
        unit: the samples.
        rows: parameter -> (len(unit), P_k) on the CPU; not to change before all is written.
        ready: returns when they are there.
        direct: past the page cache.
    """

    def __init__(
        self,
        run: RunFolder,
        unit: Unit,
        rows: Mapping[str, Tensor],
        ready: Callable[[], None] = lambda: None,
        *,
        direct: bool = False,
    ) -> None:
        self.run, self.unit, self.rows, self.ready = run, unit, rows, ready
        self.bitround = run.manifest.layout["bitround"]
        self._members: dict[str, list[str]] = {}  # path of an array -> the parameters in it
        for name in rows:
            self._members.setdefault(run.places[name].array, []).append(name)
        self._ends: dict[str, dict[PurePath, bytes]] = {path: {} for path in self._members}
        self._checksums: dict[str, int] = {}
        self._writers: dict[int, ChunkWriter] = {}  # columns of a chunk -> what writes them
        codec = run.manifest.layout["codec"]
        for path in self._members:
            columns = run.array(path).chunks[1]
            shape = (run.chunk_rows, columns)
            self._writers.setdefault(columns, ChunkWriter(shape, run.store_dtype, codec, direct=direct))

    def jobs(self) -> Iterator[tuple[Callable[[], None], int]]:
        """Yield pieces of work, and the bytes that each writes."""
        some: list[str] = []
        size = 0
        for path, names in self._members.items():
            stored = sum(self.rows[name].numel() for name in names) * self.run.store_dtype.itemsize
            chunks = self._chunks(path)
            if chunks > 1 and stored >= _PIECE:
                yield partial(self._note, names[0]), 0
                yield from ((partial(self._write, path, index), stored // chunks) for index in range(chunks))
                continue
            some.append(path)
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
        """Return the digest of the chunks of each parameter that has an array of its own, once all is written."""
        return {names[0]: self._digest(path) for path, names in self._members.items() if self._pack(path) is None}

    @property
    def pack_digests(self) -> dict[str, int]:
        """Return the digest of the chunk of each pack, by its key, once all is written."""
        return {key: self._digest(path) for path in self._members if (key := self._pack(path)) is not None}

    def _write_some(self, paths: Sequence[str]) -> None:
        for path in paths:
            for name in self._members[path]:
                self._note(name)
            for index in range(self._chunks(path)):
                self._write(path, index)

    def _note(self, name: str) -> None:
        self.ready()
        self._checksums[name] = codecs.checksum(codecs.encode(self.rows[name], self.run.store_dtype, self.bitround))

    def _write(self, path: str, index: int) -> None:
        self.ready()
        width = self.run.array(path).chunks[1]
        names = self._members[path]
        if self._pack(path) is None:
            values = self.rows[names[0]][:, index * width : (index + 1) * width]
        else:
            values = torch.cat([self.rows[name] for name in names], dim=1)
        stored = codecs.encode(values, self.run.store_dtype, self.bitround)
        place, end = self._writers[width].write(self.run.path / path, (self.unit.index, index), stored)
        self._ends[path][place.relative_to(f"c/{self.unit.index}")] = end

    def _chunks(self, path: str) -> int:
        array = self.run.array(path)
        return -(-array.shape[1] // array.chunks[1])

    def _pack(self, path: str) -> str | None:
        return self.run.places[self._members[path][0]].pack

    def _digest(self, path: str) -> int:
        return digest_of_ends(self._ends[path])
