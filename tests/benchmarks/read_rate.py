"""How fast stored rows are read, by the number of chunks that Zarr decodes at a time.

python tests/benchmarks/read_rate.py [--samples 1024] [--columns 131072]

Reads every chunk of a parameter into one buffer, as the reduction does, and once into fresh memory.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from gram_rate import make_store

from streamfisher.runtime import chunks_at_a_time
from streamfisher.store import RunStore


def read_all(store: RunStore, buffer: np.ndarray | None) -> None:
    columns, width = store.parameters["weight"], store.rows.chunk_columns("weight")
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        store.rows.columns("weight", start, stop, out=None if buffer is None else buffer[:, : stop - start])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=1 << 17)
    parser.add_argument("--codec", default="blosc-lz4")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    size = 4 * options.samples * options.columns
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "run.zarr", options.samples, options.columns, options.codec)
        buffer = np.empty((options.samples, store.rows.chunk_columns("weight")), dtype=np.float32)
        read_all(store, buffer)
        print(f"{size / 1e6:.0f} MB of float32 rows, {options.codec}, {len(os.sched_getaffinity(0))} cores; medians")
        for count in (10, 2, 1):
            for target, into in (("one buffer", buffer), ("fresh memory", None)):
                found = []
                for _ in range(options.repeats):
                    cpu, start = os.times(), time.perf_counter()
                    with chunks_at_a_time(count):
                        read_all(store, into)
                    end = os.times()
                    found.append((time.perf_counter() - start, end.user - cpu.user, end.system - cpu.system))
                wall, user, system = np.median(found, axis=0)
                print(
                    f"{count:2} chunks at a time into {target}: {size / wall / 1e6:.0f} MB/s, {wall:.2f} s; CPU "
                    f"{user:.2f} s decoding and {system:.2f} s in the kernel"
                )


if __name__ == "__main__":
    main()
