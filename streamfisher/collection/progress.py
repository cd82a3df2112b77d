"""One bar for all ranks, with rates over the last minute and a time left that follows from them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from streamfisher.byte_sizes import format_bytes
from streamfisher.data.batches import Unit
from streamfisher.runtime import run_log as runlog
from streamfisher.runtime.bars import Bar
from streamfisher.runtime.ranks import Ranks

_WINDOW = 60.0  # seconds
_REFRESH = 0.5  # seconds
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} samples [{elapsed}{postfix}]"


class Rate:
    """How fast counters grow, over a recent window: what was done before it, or by an earlier start, counts nothing.

    Args:
        window: seconds that the rate looks back, at least two observations.
        clock: seconds, for tests.
    """

    def __init__(self, window: float = _WINDOW, clock: Callable[[], float] = time.monotonic):
        self.window, self.clock = window, clock
        self._seen: deque[tuple[float, tuple[int, ...]]] = deque()

    def observe(self, *counters: int) -> None:
        """Take note of the counters now; only where they changed, so that long units are not taken for a halt."""
        if not self._seen or self._seen[-1][1] != counters:
            self._seen.append((self.clock(), counters))
        while len(self._seen) > 2 and self._seen[1][0] < self.clock() - self.window:
            self._seen.popleft()

    def per_second(self) -> tuple[float, ...] | None:
        """Return the growth of each counter per second, or `None` before it is known."""
        if len(self._seen) < 2:
            return None
        (start, before), (stop, after) = self._seen[0], self._seen[-1]
        # A unit that takes longer than the last ones did slows the rate down before it is done.
        overdue = max(self.clock() - stop - (stop - start) / (len(self._seen) - 1), 0.0)
        return tuple((b - a) / max(stop - start + overdue, 1e-9) for a, b in zip(before, after, strict=True))


class Progress:
    """The bar of one pass; rank 0 shows what all ranks have done. A context manager.

    Args:
        ranks: all that share the work.
        name: of the pass.
        todo: samples that are left to this start.
        total: samples in all.
        shown: whether there is a bar at all.
    """

    def __init__(self, ranks: Ranks, name: str, *, todo: int, total: int, shown: bool):
        self.ranks, self.name, self.todo, self.total = ranks, name, todo, total
        self.rate = Rate()
        self._drawn, self._last = 0.0, time.monotonic()
        self.bar = Bar(
            total=total,
            initial=total - todo,
            desc=name,
            bar_format=_BAR,
            disable=not (shown and ranks.is_main and todo),
        )

    def __enter__(self) -> Progress:
        self.rate.observe(0, 0, 0)
        self.ranks.on_idle = self.draw
        return self

    def __exit__(self, *error: object) -> None:
        self.ranks.on_idle = lambda: None
        if error[0] is None:
            self.draw(now=True)
        self.bar.close()

    def done(self, unit: Unit, tokens: int, size: int) -> None:
        """Count a unit that is written and marked, with its target tokens and the bytes of its rows."""
        for counter, amount in (("samples", len(unit)), ("tokens", tokens), ("bytes", size)):
            self.ranks.add(f"{self.name}/{counter}", amount)
        now = time.monotonic()
        seconds, self._last = max(now - self._last, 1e-9), now
        runlog.event(
            "unit",
            stage=self.name,
            unit=unit.index,
            samples=[unit.start, unit.stop - 1],
            tokens=tokens,
            bytes=size,
            seconds=round(seconds, 3),
            samples_per_s=round(len(unit) / seconds, 3),
        )
        self.draw()

    def draw(self, *, now: bool = False) -> None:
        """Draw the bar with what all ranks have done, not more than twice a second."""
        if self.bar.disable or (not now and time.monotonic() - self._drawn < _REFRESH):
            return
        self._drawn = time.monotonic()
        samples, tokens, size = (self.ranks.add(f"{self.name}/{what}") for what in ("samples", "tokens", "bytes"))
        self.rate.observe(samples, tokens, size)
        self.bar.n = self.total - self.todo + samples
        self.bar.set_postfix_str(self.status(samples, size), refresh=True)

    def status(self, samples: int, size: int) -> str:
        """Return rates, bytes and the time left in words."""
        rates = self.rate.per_second()
        if rates is None or rates[0] <= 0:
            return f"{format_bytes(size)} of rows, time left unknown"
        left = (self.todo - samples) / rates[0]
        return (
            f"{rates[0]:.3g} samples/s, {rates[1]:.3g} tokens/s, {format_bytes(size)} of rows, "
            f"{tqdm.format_interval(left)} left"
        )
