"""Reading what comes next while what was read is at work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from streamfisher.runtime.read_hints import ReadHints
from streamfisher.sinks.interface import OnFiles

Part = TypeVar("Part")
Read = TypeVar("Read")


class Coming:
    """Lets the disk read what the next tasks read, while those that have begun multiply. A context manager.

    Args:
        rows: where the gradients are.
        tasks: parameter, first column and one past the last of each, in the order in which they begin.
        ahead: tasks that are at work at a time.
    """

    def __init__(self, rows: OnFiles, tasks: Sequence[tuple[str, int, int]], ahead: int) -> None:
        self._rows = rows
        self._first = tasks[:ahead]
        self._next = {task[:2]: later for task, later in zip(tasks, tasks[ahead:], strict=False)}
        self._hints = ReadHints()

    def __enter__(self) -> Coming:
        self._hints.__enter__()
        for task in self._first:
            self._hints.give(partial(self._rows.files, *task))
        return self

    def __exit__(self, *error: object) -> None:
        self._hints.__exit__(*error)

    def begun(self, name: str, start: int) -> None:
        """Take note that a task has begun."""
        coming = self._next.get((name, start))
        if coming is not None:
            self._hints.give(partial(self._rows.files, *coming))


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
