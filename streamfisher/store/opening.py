"""Arrays of a run, opened so that nothing in their files can ask for more memory than the run itself needs.

A run from elsewhere may name codecs that unpack a kilobyte to gigabytes, dtypes whose elements say how long they are,
and chunks of any size. So the metadata are compared with the few forms that a run has before Zarr acts on them, and
each chunk must be of the size that its array's chunks have, by its file and by its header, before it is decoded.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.durable import LARGEST_JSON
from streamfisher.runtime.own_files import read_own
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.runtime.staging import staging_of
from streamfisher.store.remote_files import RemoteFiles

#: Bytes of one chunk, at most: no run has larger ones.
LARGEST_CHUNK = 2 << 30
#: dtype on disk -> bytes of an element, and what a chunk that is missing reads as; eigenvectors have zeros there.
_DTYPES: dict[str, tuple[int, tuple[Any, ...]]] = {
    "float64": (8, ("NaN", 0)),
    "float32": (4, ("NaN", 0)),
    "float16": (2, ("NaN", 0)),
    "uint16": (2, (0x7FC0,)),
    "int64": (8, (-1,)),
    "int32": (4, (-1,)),
    "uint8": (1, (255,)),
}
#: The chains of codecs of a chunk, after BitRound where rows are rounded.
_CODECS = (["bytes", "crc32c"], ["bytes", "zstd", "crc32c"], ["bytes", "blosc", "crc32c"])
#: What each codec may be told.
_OPTIONS = {
    "bytes": {"endian"},
    "zstd": {"level", "checksum"},
    "blosc": {"typesize", "cname", "clevel", "shuffle", "blocksize"},
    "crc32c": set(),
    "numcodecs.bitround": {"keepbits"},
}
#: What the metadata of an array say, beside the dimensions' names, attributes and transformers.
_FIELDS = {"zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs"}
_MORE_FIELDS = {"attributes", "dimension_names", "storage_transformers"}
_NAMES_OF_CHUNKS = {"name": "default", "configuration": {"separator": "/"}}
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class RunFiles(LocalStore):
    """The files of one array or group: regular ones only, no larger than they can be.

    Args:
        root: folder of the array or group.
        read_only: nothing is written.
        chunk: bytes of a decoded chunk, and the codec that packs it; `None` for a group.
        complete: a chunk that is missing is damage, and does not read as the fill value.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        read_only: bool = False,
        chunk: tuple[int, str] | None = None,
        complete: bool = False,
    ) -> None:
        super().__init__(root, read_only=read_only)
        self.chunk, self.complete = chunk, complete

    def with_read_only(self, read_only: bool = False) -> RunFiles:
        """Return the same files, to be read only or not."""
        return type(self)(self.root, read_only=read_only, chunk=self.chunk, complete=self.complete)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a file's content, `None` where there is none."""
        self._ensure_open_sync()
        return self._content(key, prototype, byte_range)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a file's content, `None` where there is none."""
        if not self._is_open:
            await self._open()
        return await asyncio.to_thread(self._content, key, prototype, byte_range)

    def _content(self, key: str, prototype: BufferPrototype | None, byte_range: ByteRequest | None) -> Buffer | None:
        return _content(self.root, self.chunk, self.complete, key, prototype, byte_range)


@dataclass(frozen=True)
class ArrayFacts:
    """What the metadata of an array say, once they are known to be of a form that a run has."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]  # shape of one
    dtype: np.dtype
    fill: float  # what a chunk that is missing reads as
    codec: str  # that packs a chunk: 'zstd', 'blosc', or 'crc32c' for bytes as they are
    attributes: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def chunk_bytes(self) -> int:
        """Return the bytes of a decoded chunk."""
        return self.dtype.itemsize * math.prod(self.chunks)


def read_facts(path: Path, *, complete: bool = False) -> ArrayFacts:
    """Return what the metadata of an array say.

    Args:
        path: of its folder.
        complete: it was written whole, so that its chunks bear out its shape.

    Raises:
        CorruptRunError: they are of no form that a run has, or its `zarr.json` is no regular file, or too large.
        OSError: it is missing.
    """
    metadata = read_own(path / "zarr.json", LARGEST_JSON)
    if staging_of(path) is not None:
        path.mkdir(parents=True, exist_ok=True)  # of an array whose files were freed
    try:
        content = json.loads(metadata)
        facts = _facts_of(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CorruptRunError(
            f"{path} is not an array as runs have them ({error}). `streamfisher verify --repair` restores its metadata."
        ) from error
    count = math.prod(-(-size // chunk) for size, chunk in zip(facts.shape, facts.chunks, strict=True))
    if complete and _files(path / "c", count) < count:
        raise CorruptRunError(f"{path} lacks some of its {count:,} chunks.")
    return facts


def _content(
    root: Path,
    chunk: tuple[int, str] | None,
    complete: bool,
    key: str,
    prototype: BufferPrototype | None,
    byte_range: ByteRequest | None,
) -> Buffer | None:
    """Return the content of a file of an array or group, `None` where there is none; see `RunFiles`."""
    path = root / key
    if byte_range is not None:
        raise CorruptRunError(f"{path} is asked for in parts; no run has chunks of such a kind.")
    try:
        content = read_own(path, _largest(key, chunk))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        if complete and key.startswith("c/"):
            raise CorruptRunError(f"{path} is missing.") from None
        return None
    if chunk is not None and key.startswith("c/"):
        size, codec = chunk
        if unpacked_size(content, codec) != size:
            raise CorruptRunError(f"{path} is not a chunk of {size:,} bytes, as those of its array are.")
    return (prototype or default_buffer_prototype()).buffer.from_bytes(content)


def _largest(key: str, chunk: tuple[int, str] | None) -> int:
    if key.endswith("zarr.json"):
        return LARGEST_JSON
    return largest_file(LARGEST_CHUNK if chunk is None else chunk[0])


def open_array(path: Path, mode: Literal["r", "r+"] = "r", *, complete: bool = False) -> zarr.Array:
    """Open an array of a run, once its metadata are known to be of a form that a run has.

    Args:
        path: of its folder.
        mode: to read, or to write too; what lies below a URL is only read.
        complete: it was written whole, so that its chunks bear out its shape, and none may be missing.

    Raises:
        CorruptRunError: they are not, or the array's `zarr.json` is no regular file, or too large.
        OSError: it is missing.
    """
    facts = read_facts(path, complete=complete)
    chunk = facts.chunk_bytes, facts.codec
    if isinstance(path, RemotePath):
        return zarr.open_array(RemoteFiles(path, partial(_content, path, chunk, complete)), mode="r", zarr_format=3)
    return zarr.open_array(
        RunFiles(path, read_only=mode == "r", chunk=chunk, complete=complete), mode=mode, zarr_format=3
    )


def largest_file(chunk_bytes: int) -> int:
    """Return the bytes that the file of a chunk may have: packing may lengthen what cannot be packed."""
    return chunk_bytes + chunk_bytes // 64 + 1024


def _files(folder: Path, most: int) -> int:
    """Return how many files lie below a folder, counting no further than `most`."""
    if isinstance(folder, RemotePath):
        return min(len(folder.store.below(folder.key)), most)
    files = (None for _, _, names in os.walk(folder) for _ in names)
    staging = staging_of(folder)
    away = 0 if staging is None else len(staging.away_below(folder))
    return away + sum(1 for _ in itertools.islice(files, min(most, 1 << 62)))


def _facts_of(metadata: Any) -> ArrayFacts:
    """Return what metadata say; `ValueError` where no run has such an array."""
    if metadata["zarr_format"] != 3 or metadata["node_type"] != "array":
        raise ValueError("it is none of Zarr 3")
    unknown = metadata.keys() - _FIELDS - _MORE_FIELDS
    if unknown:
        raise ValueError(f"it has {str(min(unknown))[:60]!r}, which no run has")
    dtype = metadata["data_type"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"its dtype is {str(dtype)[:60]}")
    itemsize, fills = _DTYPES[dtype]
    if isinstance(metadata["fill_value"], bool) or metadata["fill_value"] not in fills:
        raise ValueError(f"its fill value is {str(metadata['fill_value'])[:60]}")
    grid = metadata["chunk_grid"]
    if grid["name"] != "regular" or metadata.get("storage_transformers"):
        raise ValueError("its chunks are not laid out regularly")
    if metadata["chunk_key_encoding"] != _NAMES_OF_CHUNKS:
        raise ValueError("its chunks have other names")
    shape, chunks = metadata["shape"], grid["configuration"]["chunk_shape"]
    sizes = [*shape, *chunks]
    if (
        len(shape) != len(chunks)
        or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in sizes)
        or 0 in chunks
    ):
        raise ValueError(f"its shape is {str(shape)[:60]}, in chunks of {str(chunks)[:60]}")
    size = itemsize * math.prod(chunks)
    if size > LARGEST_CHUNK:
        raise ValueError(f"its chunks have {size:,} bytes")
    names = [codec["name"] for codec in metadata["codecs"]]
    if names[0] == "numcodecs.bitround":
        names = names[1:]
    if names not in _CODECS:
        raise ValueError(f"its codecs are {', '.join(map(str, names))[:60]}")
    for codec in metadata["codecs"]:
        options = codec.get("configuration", {})
        if codec.keys() - {"name", "configuration"} or options.keys() - _OPTIONS[codec["name"]]:
            raise ValueError(f"its codec {codec['name']} is told something that no run tells it")
        if options.get("endian", "little") != "little":
            raise ValueError("its bytes are in another order")
    named = metadata.get("dimension_names") or [None] * len(shape)
    if len(named) != len(shape) or any(not isinstance(name, str | None) for name in named):
        raise ValueError(f"its dimensions are called {str(named)[:60]}")
    attributes = metadata.get("attributes", {})
    if not isinstance(attributes, dict):
        raise ValueError(f"its attributes are {str(attributes)[:60]}")
    fill = math.nan if metadata["fill_value"] == "NaN" else metadata["fill_value"]
    return ArrayFacts(tuple(shape), tuple(chunks), np.dtype(dtype), fill, codec=names[1], attributes=attributes)


def unpacked_size(content: bytes, codec: str) -> int | None:
    """Return the bytes that a chunk says it unpacks to; `None` where it does not say.

    Args:
        content: of its file, which ends in a CRC-32C.
        codec: 'zstd', 'blosc', or 'crc32c' for bytes as they are.
    """
    if codec == "crc32c":
        return len(content) - 4
    if codec == "blosc":
        return int.from_bytes(content[4:8], "little") if len(content) >= 20 else None
    if content[:4] != _ZSTD_MAGIC or len(content) < 10:  # RFC 8878, 3.1.1.1: the frame header
        return None
    descriptor = content[4]
    single = bool(descriptor & 0x20)
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    length = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    if not length or len(content) < start + length:
        return None
    return int.from_bytes(content[start : start + length], "little") + (256 if length == 2 else 0)
