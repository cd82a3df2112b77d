"""How fast stored rows are read: by this package, by Zarr's own pipeline, by zarrs, and their files as they are.

    python tests/benchmarks/read_rate.py [--samples 1024] [--columns 131072] [--codec raw]

Every reader reads all rows, the columns of a chunk at a time as the reduction does, into one buffer. zarrs
(`pip install zarrs`) takes part where it is installed. The file system's cache is warm for all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from gram_rate import make_store

from streamfisher.runtime import chunks_at_a_time
from streamfisher.store import RunStore

PIPELINES = {"Zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs": "zarrs.ZarrsCodecPipeline"}


def edges(store: RunStore) -> list[tuple[int, int]]:
    columns, width = store.parameters["weight"], store.rows.chunk_columns("weight")
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def by_streamfisher(store: RunStore, buffer: np.ndarray) -> None:
    for start, stop in edges(store):
        store.rows.columns("weight", start, stop, out=buffer[:, : stop - start])


def by_zarr(store: RunStore, buffer: np.ndarray) -> None:
    array = zarr.open_array(store.path / "gradients" / "weight", mode="r")
    for start, stop in edges(store):
        if zarr.config.get("codec_pipeline.path") == PIPELINES["Zarr"]:
            out = zarr.core.buffer.cpu.NDBuffer(buffer[:, : stop - start])
            array.get_basic_selection((slice(None), slice(start, stop)), out=out)
        else:  # zarrs reads into memory of its own
            buffer[:, : stop - start] = array[:, start:stop]


def as_files(store: RunStore, buffer: np.ndarray) -> None:
    raw = memoryview(buffer.reshape(-1).view(np.uint8))
    for path in (store.path / "gradients").rglob("c/*/*"):
        with path.open("rb", buffering=0) as file:
            file.readinto(raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=1 << 17)
    parser.add_argument("--codec", default="raw")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    size = 4 * options.samples * options.columns
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "run.zarr", options.samples, options.columns, options.codec)
        buffer = np.zeros((options.samples, store.rows.chunk_columns("weight")), dtype=np.float32)
        last = edges(store)[-1]
        expected = np.array(store.rows.columns("weight", *last))
        print(f"{size / 1e6:.0f} MB of float32 rows, {options.codec}, {cores} cores; medians of {options.repeats}")

        def measure(what: str, read: Callable[[RunStore, np.ndarray], None]) -> None:
            found = []
            for _ in range(options.repeats):
                cpu, start = os.times(), time.perf_counter()
                read(store, buffer)
                end = os.times()
                found.append((time.perf_counter() - start, end.user - cpu.user, end.system - cpu.system))
            wall, user, system = np.median(found, axis=0)
            print(f"{what:36s} {size / wall / 1e6:6.0f} MB/s, {wall:.2f} s; CPU {user:.2f} s, kernel {system:.2f} s")

        measure("files as they are", as_files)
        measure("streamfisher, in the calling thread", by_streamfisher)
        assert np.array_equal(buffer[:, : last[1] - last[0]], expected)
        for name, path in PIPELINES.items():
            if name == "zarrs" and importlib.util.find_spec("zarrs") is None:
                print("zarrs is not installed")
                continue
            for count in (1, cores):
                buffer[...] = 0
                threads = {"codec_pipeline.path": path, "threading.max_workers": count}
                with zarr.config.set(threads), chunks_at_a_time(count):
                    measure(f"{name}, {count} chunk{'s' * (count > 1)} at a time", by_zarr)
                assert np.array_equal(buffer[:, : last[1] - last[0]], expected)


if __name__ == "__main__":
    main()
