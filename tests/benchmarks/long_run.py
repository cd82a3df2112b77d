"""Memory, file handles and time per batch of a long run: none of them may grow with the number of batches.

    python tests/benchmarks/long_run.py

One process collects a tiny model's gradients, a unit of one batch at a time, and looks at itself as it goes: resident
set, open file handles, and the time per batch since the look before. With `--waves` the model is held as factors in two
waves, whose Grams are built and whose gradients are deleted, so the batches are gone through twice.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import streamfisher as sf
from streamfisher.store import RunStore, UnitRecord


@dataclass(frozen=True)
class Look:
    """What the process held after so many batches."""

    batches: int
    rss: float  # MB, resident now
    handles: int  # open file descriptors
    milliseconds: float  # per batch, since the look before


def long_run(folder: Path, batches: int, at: Sequence[int], *, waves: bool = False) -> list[Look]:
    """Collect `batches` batches of one sample into `folder`; return what was seen after each count in `at`.

    Args:
        folder: where the run is made.
        batches: in each wave.
        at: counts of batches, over all waves.
        waves: two waves of factors, reduced and deleted, in place of one of rows that stay.
    """
    data, model = _samples(batches), _model()
    looks: list[Look] = []
    seen, since = 0, time.perf_counter()
    write = RunStore.write_unit

    def watched(store: RunStore, record: UnitRecord) -> None:
        nonlocal seen, since
        write(store, record)
        seen += 1
        if seen in at:
            now = time.perf_counter()
            elapsed = (now - since) / (seen - (looks[-1].batches if looks else 0))
            looks.append(Look(seen, _resident(), len(list(Path("/proc/self/fd").iterdir())), 1000 * elapsed))
            since = time.perf_counter()

    options = {"representation": "factors", "disk_budget": _two_waves(batches)} if waves else {}
    RunStore.write_unit = watched
    try:
        sf.collect(model, data, folder, config=sf.SpectralConfig(chunk_size=1, n_workers=1, **options))
    finally:
        RunStore.write_unit = write
    return looks


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def _samples(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randn(count, 4, generator=generator),
        "labels": torch.randn(count, 4, generator=generator),
    }


def _two_waves(batches: int) -> int:
    """Return a disk budget that one of the two layers fits: its factors beside the four Grams."""
    return 4 * 8 * batches**2 + 4 * 24 * batches


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--at", type=int, nargs="+", default=[500, 1000, 2000, 5000, 10_000])
    parser.add_argument("--waves", action="store_true", help="two waves of factors, reduced and deleted")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        looks = long_run(Path(folder) / "run.zarr", arguments.batches, arguments.at, waves=arguments.waves)
    print("batches  resident MB  open handles  ms per batch")
    for look in looks:
        print(f"{look.batches:7d}  {look.rss:11.1f}  {look.handles:12d}  {look.milliseconds:12.1f}")


if __name__ == "__main__":
    main()
