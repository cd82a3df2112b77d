"""Units of work, each handed to the rank that asks first, so that a slow rank does not hold the others up.

A claim is the next value of a counter in the store that the ranks share. It lives in memory only: after a kill there
is no stale claim, and what was claimed but not marked is handed out again. Which rank computes a unit changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streamfisher.data.batches import Unit
from streamfisher.models.batches import ModelBatches
from streamfisher.runtime.ranks import Ranks


class Claims:
    """The units of one pass over the data; iterate to claim one after the other.

    All ranks make it together, in the same order of passes. Rank 0's list counts: others may already see markers of
    units that a fast rank has finished since.

    Args:
        ranks: all that share the work.
        name: of the pass.
        units: those not done yet, as this rank sees them; only rank 0's are used.
        every: all units of the run.
        together: all ranks take the same steps, so each has a fixed share instead.
    """

    def __init__(
        self, ranks: Ranks, name: str, units: Sequence[Unit], every: Sequence[Unit], *, together: bool = False
    ):
        self.ranks = ranks
        self.name = name
        left = ranks.share(f"the units of pass {name}", [unit.index for unit in units])
        self.units = [every[index] for index in left]
        self.together = together

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[Unit]:
        if self.together:
            for unit in share_of(self.units, self.ranks.index, self.ranks.count):
                self.ranks.check()
                yield unit
            return
        while True:
            self.ranks.check()
            position = self.ranks.add(f"{self.name}/claimed", 1) - 1
            if position >= len(self.units):
                return
            yield self.units[position]


def share_of(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """Return the units of one rank of `count`: with shared weights all have to take the same steps anyway."""
    return list(units[index::count])


def idle_batches(units: Sequence[Unit], batches: ModelBatches, index: int, count: int) -> int:
    """Return how many batches the busiest rank has more than rank `index`."""
    steps = [sum(len(batches.of(unit)) for unit in share_of(units, rank, count)) for rank in range(count)]
    return max(steps) - steps[index]
