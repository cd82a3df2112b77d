"""What is free on a disk, and what a run may take of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from streamfisher.byte_sizes import format_bytes, parse_bytes
from streamfisher.config import SpectralConfig
from streamfisher.errors import CapacityError
from streamfisher.runtime.staging import staging_of

#: Kept free on the disk besides what the run needs.
DISK_MARGIN = 64 << 20
#: Bytes that an object store takes.
_UNBOUNDED = 1 << 60


def disk_limit(config: SpectralConfig, path: Path) -> int:
    """Return the bytes that a run may take on its disk, or below its URL where all gradients are to be kept."""
    staged = staging_of(path) is not None and config.keep_gradients == ("*",)  # what is sent is freed when need be
    free = _UNBOUNDED if staged else free_disk(path) - DISK_MARGIN
    return min(free, parse_bytes(config.disk_budget)) if config.disk_budget is not None else free


def free_disk(path: Path) -> int:
    """Return the bytes that are free on the disk that a path is or will be on."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_disk(path: Path, needed: int) -> None:
    """Refuse work that the disk has no room for.

    Raises:
        CapacityError: the message names what is needed, what is free, and what would help.
    """
    if staging_of(path) is not None:
        return
    free = free_disk(path)
    if needed + DISK_MARGIN > free:
        raise CapacityError(
            f"the run needs up to {format_bytes(needed)} on disk and {path.absolute().parent} has {format_bytes(free)} "
            "free. Make room, take fewer samples, or write to another disk."
        )
