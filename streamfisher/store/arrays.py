"""Small float64 arrays that are written whole."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from streamfisher.store import codecs

#: Rows and columns of one chunk.
CHUNK = 1024


def write_array(
    run: Path, path: str, values: np.ndarray, dimensions: Sequence[str], attributes: Mapping[str, Any]
) -> None:
    """Write float64 values as an array of a run, instead of any that was there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        array = zarr.create_array(
            run,
            name=path,
            shape=values.shape,
            chunks=tuple(min(size, CHUNK) for size in values.shape),
            dtype="float64",
            fill_value=float("nan"),
            compressors=codecs.compressors("zstd", torch.float64),
            dimension_names=tuple(dimensions),
            attributes=dict(attributes),
            config={"write_empty_chunks": True},
            overwrite=True,
        )
    array[...] = values
