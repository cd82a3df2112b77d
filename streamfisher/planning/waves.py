"""Waves: parameters cut into groups whose gradients fit the disk and memory budgets, one pass over the data for each.

A wave is collected, reduced to its Grams, and its gradients are deleted unless they are to be kept. Grams of different
parameters never need one another's rows, so the result is the same as that of one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamfisher.byte_sizes import format_bytes
from streamfisher.errors import CapacityError
from streamfisher.gradients.shapes import GradientShape
from streamfisher.planning.representation import Representation, sample_bytes
from streamfisher.store.kept import is_kept

#: A batch's factors exist in the graph, flattened for storing, and encoded, one tensor at a time.
FACTOR_COPIES = 2.0


@dataclass(frozen=True)
class WaveLimits:
    """What one wave may take, in bytes."""

    disk: int  # for gradients that exist at the same time, kept ones included
    memory: int  # of the host, beside the model and its activations
    disk_why: str = "--disk-budget"  # what sets the limit, for messages
    memory_why: str = "--memory-budget"
    place: str = "on disk"  # where the gradients are, for messages


@dataclass(frozen=True)
class WaveSize:
    """What one wave takes, in bytes, uncompressed."""

    parameters: tuple[str, ...]
    rows: int  # on disk, of all samples
    factors: int  # on disk, of all samples
    memory: int  # buffers of units' rows and one batch's factors
    hold: str | None = None  # where its gradients are until they are reduced, where that is not as for other waves

    @property
    def disk(self) -> int:
        """Return the sum of rows and factors."""
        return self.rows + self.factors


class WaveSizes:
    """Sizes of any group of parameters under one choice of representation.

    Args:
        shapes: of all parameters, in the model's order.
        chosen: how each is held.
        n_samples: N.
        unit_rows: samples whose rows are in memory at a time.
        batch_samples: samples of one backward pass.
        row_itemsize: bytes of a number of a row as it is computed.
        stored_itemsize: bytes of a number of a row as it is stored.
        unit_buffers: units whose rows are in memory at a time: one that is computed, and one that is written.
    """

    def __init__(
        self,
        shapes: Sequence[GradientShape],
        chosen: Mapping[str, Representation],
        *,
        n_samples: int,
        unit_rows: int,
        batch_samples: float,
        row_itemsize: int,
        stored_itemsize: int,
        unit_buffers: int = 1,
    ):
        self.shapes = {shape.name: shape for shape in shapes}
        self.chosen = chosen
        self.n_samples, self.unit_rows, self.batch_samples = n_samples, unit_rows, batch_samples
        self.row_itemsize, self.stored_itemsize = row_itemsize, stored_itemsize
        self.unit_buffers = unit_buffers

    def with_buffers(self, count: int) -> WaveSizes:
        """Return the sizes where the rows of so many units are in memory at a time."""
        return WaveSizes(
            list(self.shapes.values()),
            self.chosen,
            n_samples=self.n_samples,
            unit_rows=self.unit_rows,
            batch_samples=self.batch_samples,
            row_itemsize=self.row_itemsize,
            stored_itemsize=self.stored_itemsize,
            unit_buffers=count,
        )

    def in_memory(self, n_samples: int | None = None) -> WaveSizes:
        """Return the sizes where gradients are held in memory, in the dtype in which they are formed.

        Args:
            n_samples: whose gradients are held; `None`: of all.
        """
        return WaveSizes(
            list(self.shapes.values()),
            self.chosen,
            n_samples=n_samples or self.n_samples,
            unit_rows=0,
            batch_samples=self.batch_samples,
            row_itemsize=self.row_itemsize,
            stored_itemsize=self.row_itemsize,
        )

    def of(self, names: Sequence[str]) -> WaveSize:
        """Return the size of a wave of these parameters."""
        members = [self.shapes[name] for name in names]
        rows, factors = sample_bytes(members, self.chosen, 1)
        buffered = self.unit_buffers * self.unit_rows * rows * self.row_itemsize
        return WaveSize(
            tuple(names),
            rows=self.n_samples * rows * self.stored_itemsize,
            factors=int(self.n_samples * factors),
            memory=int(buffered + FACTOR_COPIES * self.batch_samples * factors),
        )


def cut_waves(
    sizes: WaveSizes, limits: WaveLimits, keep: Sequence[str] = (), among: Sequence[str] | None = None
) -> list[WaveSize]:
    """Return the waves, as few as fit: consecutive parameters in the model's order.

    Args:
        sizes: of groups of parameters.
        limits: of one wave.
        keep: glob patterns of parameters whose gradients stay on disk.
        among: the parameters to cut into waves; `None`: all.

    Raises:
        CapacityError: one parameter alone does not fit; the message names it and the budget that would do.
    """
    kept = [name for name in sizes.shapes if is_kept(name, keep)]
    kept_bytes = sizes.of(kept).disk
    disk = limits.disk - kept_bytes
    names = list(sizes.shapes if among is None else among)
    if not names:
        return [sizes.of(names)]
    waves: list[WaveSize] = []
    start = 0
    while start < len(names):
        wave = sizes.of(names[start : start + 1])
        if not _fits(wave, sizes, keep, disk, limits.memory):
            raise CapacityError(_too_small(names[start], wave, sizes, kept_bytes, limits))
        # As many as fit: twice as many while they do, then by halves. One at a time would take the square of them.
        least, step = 1, 1
        while step:
            grown = sizes.of(names[start : start + least + step])
            if start + least + step <= len(names) and _fits(grown, sizes, keep, disk, limits.memory):
                wave, least, step = grown, least + step, 2 * step
            else:
                step //= 2
        waves.append(wave)
        start += least
    return waves


def _fits(wave: WaveSize, sizes: WaveSizes, keep: Sequence[str], disk: int, memory: int) -> bool:
    passing = sizes.of([name for name in wave.parameters if not is_kept(name, keep)])
    return passing.disk <= disk and wave.memory <= memory


def _too_small(name: str, alone: WaveSize, sizes: WaveSizes, kept: int, limits: WaveLimits) -> str:
    if alone.memory > limits.memory:
        dense = sizes.chosen[name] == "dense"
        fits = max(int(sizes.unit_rows * limits.memory // max(alone.memory, 1)), 0) if dense else 0
        remedy = f"take --chunk-size {fits} or less, " if fits else ""
        return (
            f"the gradients of {name} alone need {format_bytes(alone.memory)} of memory for "
            f"{sizes.unit_rows if dense else round(sizes.batch_samples)} samples at a time and {limits.memory_why} "
            f"leaves {format_bytes(limits.memory)} for them. {remedy.capitalize()}give or free "
            f"{format_bytes(alone.memory - limits.memory)} more, or leave the parameter out with --exclude."
        )
    return (
        f"the gradients of {name} alone need {format_bytes(alone.disk)} {limits.place}, and {limits.disk_why} leaves "
        f"{format_bytes(max(limits.disk - kept, 0))}"
        + (f" beside {format_bytes(kept)} that --keep-gradients keeps" if kept else "")
        + f". Give or free {format_bytes(alone.disk - limits.disk + kept)} more, take fewer samples, "
        + ("write to another disk, " if limits.place == "on disk" else "")
        + "or leave the parameter out with --exclude."
    )
