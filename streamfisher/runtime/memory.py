"""How much memory there is to work in, and memory that was freed given back.

The C library keeps what was freed, and a budget counts what is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
from collections.abc import Callable, Iterator

import psutil
import torch

from streamfisher.byte_sizes import parse_bytes
from streamfisher.config import SpectralConfig

#: Of what is free on a device, a run takes at most this share.
DEVICE_MARGIN = 0.9
#: Of the free memory, what a process holds before garbage in it is worth the search.
_MUCH = 0.125


def local_ranks() -> int:
    """Return how many ranks share this host, as torchrun says it; 1 without it."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def world_size() -> int:
    """Return how many ranks there are on all hosts, as torchrun says it; 1 without it."""
    return max(int(os.environ.get("WORLD_SIZE", "1")), 1)


def working_memory(budget: int | str | None) -> int:
    """Return the bytes that a stage of this process may use: its budget, or its share of half of what is free."""
    return parse_bytes(budget) if budget else psutil.virtual_memory().available // 2 // local_ranks()


def device_room(device: torch.device, budget: int | str | None) -> int | None:
    """Return the bytes that a stage may use on a device: the budget, or what is free with a margin; `None` on a CPU."""
    if device.type != "cuda":
        return None
    if budget:
        return parse_bytes(budget)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(DEVICE_MARGIN * (free + unused))


def give_back() -> None:
    """Collect garbage and return free memory to the system; it takes tenths of a second, at the end of a stage.

    Beyond glibc, whose `malloc_trim` does it, there is nothing to call and nothing happens.
    """
    gc.collect()
    _trim()(0)


@contextlib.contextmanager
def sparing_old_objects() -> Iterator[None]:
    """Let the garbage collector pass over all objects that are there already, of which the libraries made a million.

    What is garbage among them is freed first, where it can be much: where this process holds more than a share of the
    free memory, or uses a device.
    """
    if gc.get_freeze_count():  # somebody does so already
        yield
        return
    held = psutil.Process().memory_info().rss
    if held > _MUCH * psutil.virtual_memory().available or torch.cuda.is_initialized():
        gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@functools.cache
def _trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return lambda _: 0


def of_one_rank(config: SpectralConfig) -> SpectralConfig:
    """Return the config with one rank's share of its host's memory budget."""
    if config.memory_budget is None or local_ranks() == 1:
        return config
    return config.replace(memory_budget=max(int(config.memory_budget) // local_ranks(), 1))
