"""Small float64 arrays that are written whole, and larger ones that are laid out to be filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from streamfisher.runtime.own_files import require_own
from streamfisher.runtime.staging import forget_freed
from streamfisher.store import codecs

#: Rows and columns of one chunk.
CHUNK = 1024


def write_array(
    run: Path, path: str, values: np.ndarray, dimensions: Sequence[str], attributes: Mapping[str, Any]
) -> None:
    """Write float64 values as an array of a run, instead of any that was there."""
    create_array(run, path, values.shape, dimensions, attributes)[...] = values


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


def values_of(array: zarr.Array, where: Any = ...) -> np.ndarray:
    """Return part of an array, all of it by default; chunks that are there must pass their checksums.

    Raises:
        ValueError, RuntimeError, OSError: a chunk cannot be read, see `errors.unreadable`.
    """
    return np.asarray(array[where])
