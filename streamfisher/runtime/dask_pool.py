"""How Dask runs the tasks of the Gram stage: on an active cluster, else in threads of this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dask
import threadpoolctl
import zarr
from dask.callbacks import Callback
from tqdm import tqdm

from streamfisher.config import SpectralConfig
from streamfisher.store.codecs import chunks_at_a_time


def active_client() -> Any:
    """Return the active distributed client, or `None`."""
    distributed = sys.modules.get("distributed")  # a client can only be active where it was imported
    if distributed is None:
        return None
    try:
        return distributed.default_client()
    except ValueError:
        return None


def scheduler(workers: int) -> dict[str, Any]:
    """Use the active distributed client where there is one, else threads."""
    return {"scheduler": "threads", "num_workers": workers} if active_client() is None else {}


def worker_count(config: SpectralConfig) -> int:
    """Return `n_workers`, or one for each core."""
    return config.n_workers or len(os.sched_getaffinity(0))


def blas_threads(workers: int, config: SpectralConfig) -> int:
    """Share the cores between the workers' BLAS calls; one thread each where bits must not depend on the machine."""
    return 1 if config.use_deterministic else max(1, len(os.sched_getaffinity(0)) // workers)


@contextmanager
def threads_of_this_process(workers: int, config: SpectralConfig) -> Iterator[None]:
    """Share the cores between `workers` threads, for products and for reading."""
    readers = max(1, len(os.sched_getaffinity(0)) // workers)
    with threadpoolctl.threadpool_limits(blas_threads(workers, config)), chunks_at_a_time(readers):
        yield


def limit_threads(threads: int | None) -> None:
    """Limit a worker process of a cluster, for good; `None` where `threads_of_this_process` did it."""
    if threads is not None:
        threadpoolctl.threadpool_limits(threads)
        zarr.config.set({"async.concurrency": threads})


def compute(tasks: Sequence[Any], workers: int, config: SpectralConfig, bar: Callback) -> list[Any]:
    """Compute tasks in threads of this process."""
    with threads_of_this_process(workers, config), bar:
        return list(dask.compute(*tasks, scheduler="threads", num_workers=workers))


def compute_on(client: Any, tasks: Sequence[Any], progress: bool) -> list[Any]:
    """Compute the tasks on a cluster; a worker that dies has its tasks done again by another."""
    from distributed import as_completed

    futures = client.compute(list(tasks))
    with tqdm(total=len(futures), desc="Gram", unit="parameter", disable=not progress) as bar:
        for _ in as_completed(futures):
            bar.update(1)
    return client.gather(futures)


class TaskBar(Callback):
    """Moves a bar on with each task that runs one of some functions."""

    def __init__(self, bar: tqdm, *functions: str):
        super().__init__()
        self.bar, self.prefixes = bar, tuple(f"{function}-" for function in functions)

    def _posttask(self, key: Any, *_: Any) -> None:
        if str(key[0] if isinstance(key, tuple) else key).startswith(self.prefixes):
            self.bar.update(1)
