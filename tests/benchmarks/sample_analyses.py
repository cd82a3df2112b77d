"""What the samples of a Gram are asked, timed: eigenvectors, leverage, duplicates, leave-one-out; and influence.

python tests/benchmarks/sample_analyses.py [--samples 4000] [--columns 6000] [--spot 2]

A run of random float32 rows with a decaying spectrum, one block. `--spot` samples are left out in earnest and their
spectra solved anew, which is what the numbers of all samples are compared with.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from gram_rate import PeakMemory, make_store

import streamfisher as sf
from streamfisher.byte_sizes import format_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--columns", type=int, default=6000)
    parser.add_argument("--spot", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = sf.open_run(make_store(Path(folder) / "run.zarr", options.samples, options.columns, "raw", 0.5).path)
        run.build_grams()
        start = time.perf_counter()
        with PeakMemory() as memory:
            found = run.samples()
        took = time.perf_counter() - start
        print(f"samples, N = {options.samples}: {took:.1f} s, memory {format_bytes(memory.extra)}")
        print(f"  leverages at {len(found.dampings)} dampings, {found.n_pairs} pairs alike")
        for i in range(options.spot):
            others = run.spectrum("none", samples=np.delete(np.arange(options.samples), i)).global_
            ours = found.without
            print(
                f"  without sample {i}: lambda_1 off by {ours.largest_eigenvalue[i] / others.eigenvalues[0] - 1:.1e}, "
                f"trace by {ours.trace[i] / others.trace - 1:.1e}, effective rank by "
                f"{ours.effective_rank[i] / others.metrics['effective_rank'] - 1:.1e}"
            )


if __name__ == "__main__":
    main()
