"""How Dask runs the tasks of the Gram stage: on an active cluster, else in threads of this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import dask
from dask.callbacks import Callback

from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError, first_line, require
from streamfisher.runtime.bars import Bar
from streamfisher.runtime.threads import threads_of_this_process

#: Seconds in which a scheduler must answer and have a worker.
TIMEOUT = 15.0


def active_client() -> Any:
    """Return the active distributed client, or `None`."""
    distributed = sys.modules.get("distributed")  # a client can only be active where it was imported
    if distributed is None:
        return None
    try:
        return distributed.default_client()
    except ValueError:
        return None


def compute_anywhere(tasks: Sequence[Any], workers: int) -> list[Any]:
    """Compute tasks by the active distributed client where there is one, else in threads."""
    return list(dask.compute(*tasks)) if active_client() is not None else _in_threads(tasks, workers)


def compute(tasks: Sequence[Any], workers: int, config: SpectralConfig, bar: Callback) -> list[Any]:
    """Compute tasks in threads of this process."""
    with threads_of_this_process(workers, config), bar:
        return _in_threads(tasks, workers)


def _in_threads(tasks: Sequence[Any], workers: int) -> list[Any]:
    # A pool of its own: Dask keeps one for later calls, and in a process that was forked that one has no threads.
    with ThreadPoolExecutor(workers) as pool:
        return list(dask.compute(*tasks, scheduler="threads", pool=pool))


def compute_on(client: Any, tasks: Sequence[Any], progress: bool) -> list[Any]:
    """Compute the tasks on a cluster; a worker that dies has its tasks done again by another."""
    from distributed import as_completed

    futures = client.compute(list(tasks))
    with Bar(total=len(futures), desc="Gram", unit="parameter", disable=not progress) as bar:
        for _ in as_completed(futures):
            bar.update(1)
    return client.gather(futures)


class TaskBar(Callback):
    """Moves a bar on with each task that runs one of some functions."""

    def __init__(self, bar: Bar, *functions: str):
        super().__init__()
        self.bar, self.prefixes = bar, tuple(f"{function}-" for function in functions)

    def _posttask(self, key: Any, *_: Any) -> None:
        if str(key[0] if isinstance(key, tuple) else key).startswith(self.prefixes):
            self.bar.update(1)


@contextmanager
def dask_client(address: str | None, timeout: float = TIMEOUT) -> Iterator[None]:
    """Let Grams be built by the cluster at `address` inside; `None` leaves it to threads of this process.

    The workers must see the run's folder under the same path, and have streamfisher installed.

    Raises:
        ConfigError: the scheduler does not answer, or has no worker; the message names the address.
        MissingExtraError: distributed is not installed.
    """
    if address is None:
        yield
        return
    require("distributed", "distributed", f"use the Dask scheduler at {address}")
    from distributed import Client

    try:
        # Not as the default: a client that never connected would stay it, and later reductions would wait for it.
        client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"--dask-scheduler {address}: no scheduler answered within {timeout:.0f} s ({reason}). "
            "Start one with `dask scheduler`, or leave the option out."
        ) from error
    with client, client.as_current():
        try:
            client.wait_for_workers(1, timeout=timeout)
        except TimeoutError as error:
            raise ConfigError(
                f"--dask-scheduler {address}: the scheduler has no worker after {timeout:.0f} s. "
                f"Start some with `dask worker {address}`."
            ) from error
        yield
