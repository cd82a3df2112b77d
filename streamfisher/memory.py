"""How much memory there is to work in, and memory that was freed given back.

The C library keeps what was freed, and a budget counts what is kept.
"""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable

import psutil


def working_memory(budget: int | None) -> int:
    """Return the bytes that a stage may use: the stated budget, or half of what is free."""
    return budget or psutil.virtual_memory().available // 2


def give_back() -> None:
    """Collect garbage and return free memory to the system; at the end of a stage, where milliseconds are nothing.

    Beyond glibc, whose `malloc_trim` does it, there is nothing to call and nothing happens.
    """
    gc.collect()
    _trim()(0)


@functools.cache
def _trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return lambda _: 0
