"""Whether packing chunks is worth its while on this disk with these cores: `codec='auto'`."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from streamfisher.config import Codec
from streamfisher.runtime.memory import local_ranks
from streamfisher.store import codecs

#: Less than that is stored as it is: measuring would take longer than anything it could save.
LEAST_MEASURED = 1 << 30
#: Of what is free on the disk, gradients that would take more are packed whatever it costs.
CROWDED = 0.5
_PROBE_BYTES = 16 << 20
_PROBE_FILES = 4


@dataclass(frozen=True)
class PackingRates:
    """What decides."""

    disk: float  # bytes/s that the disk takes, page cache aside
    packing: float  # bytes/s that one core packs
    ratio: float  # packed bytes over bytes
    cores: int  # of one rank

    def packing_wins(self, *, on_device: bool) -> bool:
        """Return whether a run is faster that packs its gradients.

        The disk saves `(1 - ratio) / disk` of each byte. Where gradients come from a device, the host's cores have time
        to pack, as long as they are faster than the disk; where the same cores compute, packing takes time from that.

        Args:
            on_device: gradients are computed elsewhere than on these cores.
        """
        saved = (1 - self.ratio) / self.disk
        if on_device:
            return saved > 0 and self.packing * max(self.cores - 1, 1) > self.disk
        return saved > 1 / (self.packing * self.cores)


@dataclass(frozen=True)
class CodecChoice:
    """A codec and why."""

    codec: Codec
    why: str


def choose_codec(
    asked: Codec,
    folder: Path,
    size: float,
    *,
    dtype: torch.dtype,
    on_device: bool,
    free: float = math.inf,
    rounded: bool = False,
) -> CodecChoice:
    """Return the codec of a new run's gradients: what was asked for, or what `auto` comes to here.

    Args:
        asked: of the config.
        folder: on the disk that is meant; it need not exist yet, but some folder above it does.
        size: bytes of all gradients, as they are.
        dtype: in which they are stored.
        on_device: they are computed elsewhere than on the cores that would pack them.
        free: bytes that the run may take on the disk.
        rounded: mantissa bits were dropped, so that they pack well.
    """
    if asked != "auto":
        return CodecChoice(asked, "as asked for")
    if rounded:
        return CodecChoice("blosc-lz4", "they are rounded, which is for packing")
    if size > CROWDED * free:
        return CodecChoice("blosc-lz4", "they would take more than half of what the disk has left")
    if size < LEAST_MEASURED:
        return CodecChoice("raw", "they are small")
    rates = measure_packing(folder, dtype)
    known = (
        f"the disk takes {rates.disk / 1e9:.2g} GB/s, and a core packs {rates.packing / 1e9:.2g} GB/s to "
        f"{100 * rates.ratio:.0f} %"
    )
    return CodecChoice("blosc-lz4" if rates.packing_wins(on_device=on_device) else "raw", known)


def measure_packing(folder: Path, dtype: torch.dtype) -> PackingRates:
    """Measure disk and packing, in a tenth of a second on a fast disk."""
    while not folder.is_dir():
        folder = folder.parent
    stored = codecs.stored_dtype(dtype)
    numbers = np.random.Generator(np.random.PCG64(0)).standard_normal(_PROBE_BYTES // stored.itemsize, dtype=np.float32)
    values = codecs.encode(torch.from_numpy(numbers), dtype)
    pack = codecs.packer("blosc-lz4", stored.itemsize)
    assert pack is not None
    packed = pack(values)  # warms up
    start = time.perf_counter()
    packed = pack(values)
    packing = time.perf_counter() - start
    disk = 0.0
    for _ in range(_PROBE_FILES):
        with tempfile.TemporaryFile(dir=folder) as file:  # it has no name, so that a kill leaves nothing
            start = time.perf_counter()
            file.write(values.data)
            file.flush()
            os.fdatasync(file.fileno())
            disk += time.perf_counter() - start
    return PackingRates(
        disk=_PROBE_FILES * values.nbytes / disk,
        packing=values.nbytes / packing,
        ratio=len(packed) / values.nbytes,
        cores=max(1, len(os.sched_getaffinity(0)) // local_ranks()),
    )
