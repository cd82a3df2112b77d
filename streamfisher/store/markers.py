"""Markers: what is finished, and how it is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import zarr

from streamfisher.data.batches import Unit
from streamfisher.store.manifest import Manifest


class StorePart:
    """Attributes of a `RunStore` that its parts use, and what they use of each other."""

    path: Path
    manifest: Manifest
    parameters: dict[str, int]  # name -> number of elements
    n_samples: int
    chunk_rows: int  # samples of a unit
    store_dtype: torch.dtype
    row_dtype: torch.dtype
    centered: bool
    units: list[Unit]
    waves: list[list[str]]
    keep: list[str]  # patterns of parameters whose gradients stay
    gram_members: dict[str, list[str]]  # Gram key -> the parameters it sums over
    fsync: bool  # flush the filesystem before each marker
    marker: Any
    done_units: Any
    is_done: Any
    factor_entries: Any
    wave_of: Any
    mean: Any
    per_sample: Any
    _markers: dict[tuple[int, int], dict[str, Any]]  # (wave, unit) -> its marker, once read
    _arrays: dict[str, zarr.Array]
    _array: Any
    _mark: Any


def stage_of(wave: int) -> str:
    """Return the name of the stage of markers that a wave's units have."""
    return "rows" if wave == 0 else f"rows.{wave}"
