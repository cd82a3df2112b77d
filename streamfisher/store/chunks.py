"""Chunks of an array, encoded and written as Zarr would, in the calling thread and without copies of their own.

Zarr lays arrays out and reads them; it also encodes and writes small ones. For gradients its way of writing costs more
than the disk does (docs/design.md has the figures): each chunk is copied out of its rows, again to append the checksum,
and passes an event loop that all threads share. Here rows go to the file from where they lie, and the last 4 bytes of
a chunk, which bind it to its place, are known without reading it back.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from io import BufferedWriter
from pathlib import Path, PurePath

import google_crc32c
import numpy as np
import torch

from streamfisher.config import Codec
from streamfisher.runtime.direct_io import LEAST_DIRECT, DirectFile, is_refused
from streamfisher.runtime.durable import replacing
from streamfisher.store import codecs

#: Rows of a chunk are written one by one from where they lie if they have so many bytes; shorter ones are copied.
_LONG_ROW = 16 << 10


class ChunkWriter:
    """Writes chunks of one shape.

    Args:
        shape: of a chunk.
        dtype: of the values; `None`: int32 token ids.
        codec: of the array.
        direct: past the page cache, where chunks are large and the filesystem can.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype | None, codec: Codec, *, direct: bool = False):
        self.shape = shape
        self.dtype = np.dtype("int32") if dtype is None else codecs.stored_dtype(dtype)
        self.fill = -1 if dtype is None else codecs.fill_value(dtype)
        self._direct = direct and math.prod(shape) * self.dtype.itemsize >= LEAST_DIRECT
        self._pack = codecs.packer(codec, self.dtype.itemsize)

    def write(self, array: Path, index: tuple[int, ...], values: np.ndarray) -> tuple[PurePath, bytes]:
        """Write the chunk at a place of the grid, whole or not at all; the folder of the array is there.

        Args:
            array: folder.
            index: of the chunk along each axis.
            values: of the stored dtype, at most of the chunk's shape; what is beyond them holds the fill value.

        Returns:
            Path below the array's folder, and the last 4 bytes, for `digest_of_ends`.

        Raises:
            OSError: the disk failed.
        """
        place = PurePath("c", *map(str, index))
        path = array / place
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            end = self._put(partial, values)
        return place, end

    def _put(self, path: Path, values: np.ndarray) -> bytes:
        """Fill a file and return its last 4 bytes; where the filesystem refuses direct I/O, also midway, without."""
        if self._direct:
            try:
                with DirectFile(path) as direct:
                    return self._fill(direct, values)
            except OSError as error:
                if not is_refused(error):
                    raise
        with path.open("wb") as file:
            return self._fill(file, values)

    def _fill(self, file: DirectFile | BufferedWriter, values: np.ndarray) -> bytes:
        checksum = 0
        for piece in self._pieces(values):
            checksum = google_crc32c.extend(checksum, piece)
            file.write(piece.data)
        end = struct.pack("<I", checksum)
        file.write(memoryview(end))
        return end

    def _pieces(self, values: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the bytes of an encoded chunk, but for its checksum."""
        if values.shape != self.shape:
            padded = np.full(self.shape, self.fill, dtype=self.dtype)
            padded[tuple(slice(size) for size in values.shape)] = values
            values = padded
        if self._pack is not None:
            yield np.frombuffer(self._pack(np.ascontiguousarray(values)), dtype=np.uint8)
        elif values.flags.c_contiguous or values[0].nbytes < _LONG_ROW:
            yield _bytes_of(np.ascontiguousarray(values))
        else:
            for row in values:
                yield _bytes_of(row)


def _bytes_of(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
