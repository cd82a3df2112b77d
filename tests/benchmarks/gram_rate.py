"""How near the Gram stage, reading from Zarr, comes to the machine's matrix-product peak, and what memory it takes.

python tests/benchmarks/gram_rate.py [--samples 1024] [--columns 262144] [--budget 400MB] [--tiles]

The peak is one large `b @ b.T` in float32 with all cores, in memory, in the same run. Each reduction is measured in a
fresh process: its rate over the peak, and what its resident set grew by over what is planned for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch

import streamfisher as sf
from streamfisher.byte_sizes import format_bytes, parse_bytes
from streamfisher.config import dtype_name
from streamfisher.reduction import build_tiled_grams, plan_slabs
from streamfisher.reduction import gram as grams
from streamfisher.reduction.slabs import DECODING_BYTES, sums_bytes
from streamfisher.reduction.tiles import tile_bytes
from streamfisher.sinks import MemoryRows
from streamfisher.store import PANEL, Manifest, RunStore, UnitRecord, chunk_columns, versions

CHUNK_ROWS = 32


def make_store(path: Path, n: int, p: int, codec: str, decay: float = 0.0) -> RunStore:
    """Write random float32 rows, which compress as little as gradients do, as one parameter `weight`.

    Column j has the standard deviation `(j + 1)^-decay`.
    """
    config = sf.SpectralConfig(chunk_size=CHUNK_ROWS, codec=codec)
    layout = {"chunk_rows": CHUNK_ROWS, "dtype_row": "float32", "dtype_store": "float32", "bitround": None}
    width = chunk_columns(p, n, CHUNK_ROWS, 4)
    parameter = {"name": "weight", "shape": [p], "dtype": dtype_name(torch.float32), "chunk_columns": width}
    data = {"n_samples": n, "chunk_digests": [""] * -(-n // CHUNK_ROWS), "fingerprint": "", "description": None}
    manifest = Manifest(
        config=config.to_dict(),
        identity=config.identity(),
        model={"class": "random rows", "fingerprint": "", "n_params": p},
        parameters=[parameter],
        excluded={},
        data=data,
        loss={"loss": "none", "loss_reduction": "none"},
        layout=layout | {"codec": codec, "centered": False},
        probe={},
        versions=versions(),
    )
    store = RunStore.create(path, manifest)
    generator = np.random.default_rng(0)
    for unit in store.units:
        rows = torch.from_numpy(generator.standard_normal((len(unit), p), dtype=np.float32))
        rows *= torch.arange(1, p + 1, dtype=torch.float32) ** -decay
        norms = {"weight": torch.linalg.vecdot(rows, rows).double().numpy()}
        store.write_unit(
            UnitRecord(unit, {"weight": rows}, np.zeros(len(unit)), np.ones(len(unit), dtype=np.int64), norms, {})
        )
    return store


def peak_rate(n: int, columns: int) -> float:
    """Return the FLOP/s of the best of five in-memory products of (n, columns) float32 with all cores."""
    b = np.random.default_rng(0).standard_normal((n, columns), dtype=np.float32)
    best = min(_timed(lambda: b @ b.T) for _ in range(5))
    return n * n * columns / best


def _timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class PeakMemory:
    """The largest resident set of this process while it is open, over what it was at the start."""

    def __enter__(self) -> PeakMemory:
        self.process, self.open = psutil.Process(), True
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.open:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *error: object) -> None:
        self.open = False
        self.thread.join()
        self.extra = self.peak - self.before


def reduce(path: Path, workers: int, budget: int, tiles: bool, dtype: str) -> dict[str, float]:
    """Build the Gram of the stored rows in this process; return seconds, extra bytes, and the error of the Gram."""
    store = RunStore(path)
    config = sf.SpectralConfig(n_workers=workers, memory_budget=budget, dtype_gram=dtype)
    n = store.n_samples
    found: list[np.ndarray] = []
    # The BLAS and its threads take their own buffers at their first large product; they belong to the base.
    warm_up = MemoryRows({f"p{i}": np.ones((512, PANEL), dtype=np.float32) for i in range(2 * workers)})
    grams.build_grams(warm_up, config, lambda gram: None)
    store.rows.columns("weight", 0, 1, rows=slice(0, 1))
    with PeakMemory() as memory:
        start = time.perf_counter()
        if tiles:
            sink = _InMemory(n, found)
            build_tiled_grams(store.rows, config, sink, {"weight": ["weight"]}, budget=budget)
            planned = tile_bytes(workers, store.rows.chunk_columns("weight")) + 8 * n**2
        else:
            grams.build_grams(store.rows, config, lambda gram: found.append(gram.gram))
            slabs = plan_slabs(store.rows, "weight", np.dtype(dtype), budget // workers)
            planned = workers * (sums_bytes(n) + slabs.size) + DECODING_BYTES
        seconds = time.perf_counter() - start
    rows = store.rows.columns("weight", 0, store.parameters["weight"], rows=slice(0, 64)).astype(np.float64)
    exact = rows @ rows.T
    error = float(np.abs(found[0][:64, :64] - exact).max() / exact.max())
    return {"seconds": seconds, "extra": memory.extra, "planned": planned, "error": error}


class _InMemory:
    """Takes tiles into one matrix."""

    def __init__(self, n: int, found: list[np.ndarray]):
        self.gram = np.zeros((n, n))
        found.append(self.gram)

    def todo(self, key, tiles):
        return list(tiles)

    def write(self, key, finished):
        tile = finished.tile
        self.gram[tile.rows, tile.columns] = finished.values
        self.gram[tile.columns, tile.rows] = finished.values.T

    def finish(self, key, tiles):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=1 << 18)
    parser.add_argument("--budget", default="400MB")
    parser.add_argument("--codec", default="blosc-lz4")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tiles", action="store_true", help="build by tiles instead of whole")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    budget = parse_bytes(options.budget)
    if options.store:
        print(json.dumps(reduce(options.store, options.workers, budget, options.tiles, options.dtype)))
        return
    n, p = options.samples, options.columns
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "run.zarr", n, p, options.codec)
        print(f"N = {n}, {p} columns, {options.codec}, {cores} cores, budget {format_bytes(budget)}, best of each")
        for workers in sorted({1, cores}):
            command = [sys.executable, __file__, "--store", str(store.path), "--workers", str(workers)]
            command += ["--budget", options.budget, "--dtype", options.dtype, *(["--tiles"] if options.tiles else [])]
            peak, found = 0.0, []
            for _ in range(options.repeats):  # peak and reduction in turn: other processes disturb both alike
                peak = max(peak, peak_rate(n, min(p, 1 << 16)))
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            rate = n * n * p / min(one["seconds"] for one in found)
            extra, planned = max(one["extra"] for one in found), found[0]["planned"]
            print(
                f"{workers} workers x {max(1, cores // workers)} threads: {rate / 1e9:.1f} of {peak / 1e9:.1f} "
                f"GFLOP/s, {100 * rate / peak:.0f} %; memory {format_bytes(extra)} of {format_bytes(planned)} planned, "
                f"{100 * extra / planned:.0f} %; largest error of an entry {found[0]['error']:.1e} of the largest"
            )


if __name__ == "__main__":
    main()
