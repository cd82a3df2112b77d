"""Bytes before work: what a run will need on disk and in memory, and whether it is there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from streamfisher.config import format_bytes
from streamfisher.errors import CapacityError
from streamfisher.store.codecs import stored_dtype

#: Kept free on the disk besides what the run needs.
_DISK_MARGIN = 64 << 20


@dataclass(frozen=True)
class StorePlan:
    """What a dense run of N samples and P parameters puts on disk, in bytes, uncompressed."""

    gradients: int
    grams: int
    mean: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.gradients + self.grams + self.mean


def plan_store(
    n_samples: int, parameters: Mapping[str, int], dtype: torch.dtype, *, centered: bool, chunk_rows: int
) -> StorePlan:
    """Return the bytes of rows, Grams and, for centered rows, of the mean pass.

    Rows: `N P itemsize`. Grams: `8 N^2` per parameter. Mean: `8 P (units + 1)`.
    """
    p = sum(parameters.values())
    units = -(-n_samples // chunk_rows)
    return StorePlan(
        gradients=n_samples * p * stored_dtype(dtype).itemsize,
        grams=8 * n_samples**2 * len(parameters),
        mean=8 * p * (units + 1) if centered else 0,
    )


def check_disk(path: Path, needed: int) -> None:
    """Refuse work that the disk has no room for.

    Raises:
        CapacityError: the message names what is needed, what is free, and what would help.
    """
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed + _DISK_MARGIN > free:
        raise CapacityError(
            f"the run needs up to {format_bytes(needed)} on disk and {folder} has {format_bytes(free)} free. Take "
            "fewer samples, store rows in bfloat16 (--store-dtype bfloat16, half the size), or write to another disk."
        )


def check_row_buffer(n_params: int, rows: int, dtype: torch.dtype) -> None:
    """Refuse a chunk of rows that the host memory cannot hold.

    Raises:
        CapacityError: the message names the size, what is free, and the largest chunk that fits.
    """
    needed = 2 * rows * n_params * torch.finfo(dtype).bits // 8
    free = psutil.virtual_memory().available
    if needed > free:
        fits = max(free * rows // needed, 0)
        raise CapacityError(
            f"{rows} gradient rows of {n_params:,} parameters need {format_bytes(needed)} of memory and "
            f"{format_bytes(free)} is free. "
            + (
                f"Use --chunk-size {fits} or less."
                if fits
                else "Not even one row fits; select parameters with --include."
            )
        )
