"""Reading what comes next while what was read is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Read = TypeVar("Read")


def read_ahead(read: Callable[[Part], Read], parts: Sequence[Part], *, ahead: bool = True) -> Iterator[Read]:
    """Yield what `read` returns of each part; with `ahead`, a thread reads one part while the one before is used.

    Args:
        read: called with one part after the other.
        parts: in order.
        ahead: there is room for two of what is read.
    """
    if not ahead or len(parts) < 2:
        yield from map(read, parts)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        coming = reader.submit(read, parts[0])
        for turn in range(len(parts)):
            found = coming.result()
            if turn + 1 < len(parts):
                coming = reader.submit(read, parts[turn + 1])
            yield found
