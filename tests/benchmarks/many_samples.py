"""A Gram larger than the memory budget: built by tiles, its largest eigenvalues and density, and the memory it took.

python tests/benchmarks/many_samples.py [--samples 8192] [--columns 16384] [--budget 600MB] [--top-k 20] [--dense]

`--dense` solves for all eigenvalues afterwards, without a budget, and compares.
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
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=16384)
    parser.add_argument("--budget", default="600MB")
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--dense", action="store_true")
    options = parser.parse_args()
    n = options.samples
    with tempfile.TemporaryDirectory() as folder:
        path = make_store(Path(folder) / "run.zarr", n, options.columns, "blosc-lz4", decay=0.5).path
        run = sf.open_run(path)
        config = run.config.replace(memory_budget=options.budget)
        print(f"N = {n}, {options.columns} columns; one Gram {format_bytes(8 * n * n)}, budget {options.budget}")
        for what, work in (
            ("Gram by tiles", lambda: run.build_grams(config)),
            ("largest eigenvalues", lambda: run.spectrum("none", top_k=options.top_k, config=config)),
            (
                "density, 4 vectors",
                lambda: run.spectral_density("global", block_structure="none", n_vectors=4, n_steps=30, config=config),
            ),
        ):
            start = time.perf_counter()
            with PeakMemory() as memory:
                found = work()
            print(f"{what}: {time.perf_counter() - start:.0f} s, memory {format_bytes(memory.extra)}")
            if what == "largest eigenvalues":
                spectrum = found
        block = spectrum.global_
        print(f"largest residual {block.residuals.max() / block.eigenvalues[0]:.1e} of lambda_1, {block.solver}")
        print(f"density: {found.integral + found.below:.6f} eigenvalues of {n}")
        if options.dense:
            start = time.perf_counter()
            exact = run.spectrum("none", config=run.config.replace(solver="dense"))
            error = np.abs(exact.global_.eigenvalues[: options.top_k] - block.eigenvalues).max() / block.eigenvalues[0]
            counts = np.histogram(exact.global_.eigenvalues, found.edges)[0]
            print(f"all eigenvalues, in memory: {time.perf_counter() - start:.0f} s; differ by {error:.1e} of lambda_1")
            print(
                f"counts by decade {counts.tolist()}, density {found.counts.round(1).tolist()}, "
                f"standard errors {found.count_errors.round(1).tolist()}"
            )


if __name__ == "__main__":
    main()
