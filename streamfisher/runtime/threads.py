"""Threads: how many workers, how many of BLAS in each, how many chunks coded at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import threadpoolctl
import zarr

from streamfisher.config import SpectralConfig
from streamfisher.runtime.memory import local_ranks

#: Chunks that Zarr codes at a time unless it is told otherwise; more would hold memory that no budget counts.
_ZARR_CONCURRENCY = 10


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def is_forked() -> bool:
    """Return whether this process was forked from one that had this package: OpenMP's threads did not come along.

    GNU OpenMP waits for them for ever where a process forks after it has used some; with one thread it needs none.
    """
    return _forked


def worker_count(config: SpectralConfig) -> int:
    """Return `n_workers`, or one for each core."""
    return config.n_workers or len(os.sched_getaffinity(0))


def blas_threads(workers: int, config: SpectralConfig) -> int:
    """Share the cores between the workers' BLAS calls; one thread each where bits must not depend on the machine."""
    return 1 if config.use_deterministic or is_forked() else max(1, len(os.sched_getaffinity(0)) // workers)


def write_threads() -> int:
    """Return how many threads of this rank encode and write gradients beside the pass: its cores, but at most eight."""
    return max(1, min(len(os.sched_getaffinity(0)) // local_ranks(), 8))


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


@contextlib.contextmanager
def chunks_at_a_time(count: int) -> Iterator[None]:
    """Let Zarr encode or decode `count` chunks at a time in this process: at least one, and at most its default.

    It would take ten for each call: more threads than there are cores for them beside the products, each with buffers
    of its own (docs/design.md has the figures).
    """
    with zarr.config.set({"async.concurrency": max(1, min(count, _ZARR_CONCURRENCY))}):
        yield
