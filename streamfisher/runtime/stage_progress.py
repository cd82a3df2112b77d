"""Bars for stages of an analysis: from the start where it is large, else once it has taken two seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from streamfisher.runtime.bars import Bar

T = TypeVar("T")

#: A stage that takes longer shows how far it is.
_SECONDS = 2.0
#: Samples from which on a single eigensolve may take as long.
_LARGE = 1500


def steps(items: Iterable[T], title: str, *, show: bool, n_samples: int = 0) -> Iterator[T]:
    """Yield the items of a stage, with a bar on stderr that says how many are done.

    Args:
        items: of known length, for example blocks.
        title: of the bar.
        show: `False` says nothing.
        n_samples: size of the matrices; large ones have their bar at once, for one step of them takes long.
    """
    if not show:
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    delay = 0.0 if n_samples >= _LARGE else _SECONDS
    yield from Bar(items, desc=title, total=total, delay=delay, leave=False, mininterval=0.5)
