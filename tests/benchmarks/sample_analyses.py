"""What the samples of a Gram are asked, timed: eigenvectors, leverage, duplicates, leave-one-out; and influence.

python tests/benchmarks/sample_analyses.py [--samples 4000] [--columns 6000] [--spot 2]

A run of random float32 rows with a decaying spectrum, one block. `--spot` samples are left out in earnest and their
spectra solved anew, which is what the numbers of all samples are compared with.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gram_rate import PeakMemory, make_store

import streamfisher as sf
from streamfisher.byte_sizes import format_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--columns", type=int, default=6000)
    parser.add_argument("--spot", type=int, default=2)
    parser.add_argument("--queries", type=int, default=1000, help="0: no influence")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = sf.open_run(make_store(Path(folder) / "run.zarr", options.samples, options.columns, "raw", 0.5).path)
        run.build_grams()
        found = timed(f"samples, N = {options.samples}", run.samples)
        print(f"  leverages at {len(found.dampings)} dampings, {found.n_pairs} pairs alike")
        for i in range(options.spot):
            others = run.spectrum("none", samples=np.delete(np.arange(options.samples), i)).global_
            ours = found.without
            print(
                f"  without sample {i}: lambda_1 off by {ours.largest_eigenvalue[i] / others.eigenvalues[0] - 1:.1e}, "
                f"trace by {ours.trace[i] / others.trace - 1:.1e}, effective rank by "
                f"{ours.effective_rank[i] / others.metrics['effective_rank'] - 1:.1e}"
            )
    if not options.queries:
        return
    with tempfile.TemporaryDirectory() as folder:
        n = options.samples + options.queries
        run = sf.open_run(make_store(Path(folder) / "run.zarr", n, options.columns, "raw", 0.5).path)
        run.build_grams()
        for dampings in ([1e-3], list(np.geomspace(1e-4, 1.0, 5))):
            what = f"{options.queries} queries, {options.samples} samples, {len(dampings)} dampings"
            timed(what, lambda: run.influence(slice(options.samples, n), dampings, "global"))  # noqa: B023


def timed(what: str, work: Callable[[], Any]) -> Any:
    """Return what `work` returns; print the seconds, of the clock and of all cores together, and the memory."""
    start, cores = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        found = work()
    took, cores = time.perf_counter() - start, time.process_time() - cores
    print(f"{what}: {took:.1f} s, {cores:.1f} s of cores, memory {format_bytes(memory.extra)}")
    return found


if __name__ == "__main__":
    main()
