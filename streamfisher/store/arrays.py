"""Arrays that are written whole, with the metadata that Zarr gives them; larger ones are laid out to be filled.

Zarr says what the metadata are; the files are written and read in the calling thread (docs/design.md has the figures:
through Zarr each small array costs some milliseconds at the one event loop of the process).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from streamfisher.config import Codec
from streamfisher.runtime.durable import replacing
from streamfisher.runtime.own_files import remove_tree, require_own
from streamfisher.runtime.staging import forget_freed
from streamfisher.store import codecs
from streamfisher.store.chunk_reading import ChunkReader
from streamfisher.store.chunks import ChunkWriter
from streamfisher.store.integrity import digest_of_ends
from streamfisher.store.opening import ArrayFacts

#: Rows and columns of one chunk.
CHUNK = 1024


def write_array(
    run: Path, path: str, values: np.ndarray, dimensions: Sequence[str], attributes: Mapping[str, Any]
) -> int:
    """Write float64 values as an array of a run, instead of any that was there.

    Returns:
        The digest of its files, see `integrity.chunk_digest`.

    Raises:
        CorruptRunError: the path passes through a link.
        OSError: the disk failed.
    """
    require_own(run, run / path)  # what is there is deleted
    for parent in reversed(PurePath(path).parents[:-1]):
        _require_group(run / parent)
    chunk = tuple(min(size, CHUNK) for size in values.shape)
    metadata = array_metadata(values.shape, chunk, torch.float64, "zstd", dimensions, attributes)
    return write_whole(run / path, values, ChunkWriter(chunk, torch.float64, "zstd"), metadata)


def write_whole(folder: Path, stored: np.ndarray, writer: ChunkWriter, metadata: bytes) -> int:
    """Write an array instead of any that was there; return the digest of its files.

    Args:
        folder: of the array.
        stored: its values, as they are stored.
        writer: of its chunks.
        metadata: content of its `zarr.json`.
    """
    if os.path.lexists(folder):
        remove_tree(folder.parent, folder)
    forget_freed(folder)
    folder.mkdir(parents=True)
    with replacing(folder / "zarr.json") as partial:
        partial.write_bytes(metadata)
    ends: dict[PurePath, bytes] = {PurePath("zarr.json"): metadata}
    grid = [-(-size // step) for size, step in zip(stored.shape, writer.shape, strict=True)]
    for index in np.ndindex(*grid):
        where = tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, writer.shape, strict=True))
        place, end = writer.write(folder, index, stored[where])
        ends[place] = end
    return digest_of_ends(ends)


def array_metadata(
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: torch.dtype | None,
    codec: Codec,
    dimensions: Sequence[str],
    attributes: Mapping[str, Any],
) -> bytes:
    """Return the `zarr.json` that Zarr gives an array.

    Args:
        shape: of the array.
        chunk: shape of a chunk.
        dtype: of the values; `None`: int32 token ids.
        codec: of the chunks.
        dimensions: names of the axes.
        attributes: of the array.
    """
    metadata = json.loads(_plain_metadata(shape, chunk, dtype, codec))
    metadata["dimension_names"], metadata["attributes"] = list(dimensions), dict(attributes)
    return json.dumps(metadata, indent=2, allow_nan=False).encode()


@functools.lru_cache(maxsize=256)
def _plain_metadata(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: torch.dtype | None, codec: Codec) -> bytes:
    """Return the metadata without what arrays of one shape differ in."""
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=shape,
        chunks=chunk,
        dtype=np.dtype("int32") if dtype is None else codecs.stored_dtype(dtype),
        fill_value=-1 if dtype is None else codecs.fill_value(dtype),
        compressors=codecs.compressors(codec, dtype or torch.float32),
        config={"write_empty_chunks": True},
    )
    return _content(store)


@functools.cache
def _group_metadata() -> bytes:
    store = MemoryStore()
    zarr.create_group(store, zarr_format=3)
    return _content(store)


def _content(store: MemoryStore) -> bytes:
    found = sync(store.get("zarr.json", default_buffer_prototype()))
    assert found is not None
    return found.to_bytes()


def _require_group(folder: Path) -> None:
    """Let a folder be a group."""
    path = folder / "zarr.json"
    if not os.path.lexists(path):
        folder.mkdir(exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(_group_metadata())


def create_array(
    run: Path,
    path: str,
    shape: tuple[int, ...],
    dimensions: Sequence[str],
    attributes: Mapping[str, Any],
    chunk: int = CHUNK,
) -> zarr.Array:
    """Lay out a float64 array of a run, instead of any that was there; what is not written reads as NaN."""
    require_own(run, run / path)  # what is there is deleted
    forget_freed(run / path)
    return zarr.create_array(
        run,
        name=path,
        shape=shape,
        chunks=tuple(min(size, chunk) for size in shape),
        dtype="float64",
        fill_value=float("nan"),
        compressors=codecs.compressors("zstd", torch.float64),
        dimension_names=tuple(dimensions),
        attributes=dict(attributes),
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def read_array(path: Path, facts: ArrayFacts, where: tuple[slice, ...] | None = None) -> np.ndarray:
    """Return part of an array, all of it by default; a chunk that is missing reads as the fill value.

    Args:
        path: of its folder.
        facts: of its metadata.
        where: a slice for each axis.

    Raises:
        CorruptRunError: a chunk is of another size.
        ValueError, RuntimeError, OSError: a chunk cannot be read, see `errors.unreadable`.
    """
    parts = where or (slice(None),) * len(facts.shape)
    spans = [slice(*part.indices(size)[:2]) for part, size in zip(parts, facts.shape, strict=True)]
    out = np.empty([max(span.stop - span.start, 0) for span in spans], dtype=facts.dtype)
    return ChunkReader(path, facts).read_into(tuple(spans), out)


def values_of(array: zarr.Array, where: Any = ...) -> np.ndarray:
    """Return part of an array, all of it by default; chunks that are there must pass their checksums.

    Raises:
        ValueError, RuntimeError, OSError: a chunk cannot be read, see `errors.unreadable`.
    """
    return np.asarray(array[where])
