"""The products of the gradients of two runs, by the reduction that makes a Gram: the second run's samples come after.

A Gram of rows that grew forms the products of the new rows only, with all rows. So the rows of a first source, followed
by those of a second, are reduced as if the second had been added: same slabs, same kernels of factors, same precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streamfisher.config import SpectralConfig
from streamfisher.reduction.gram import GrownGram, ParameterGram, build_grams
from streamfisher.sinks.interface import GradientSource
from streamfisher.store.factors import FactorSegment


class JoinedRows:
    """The samples of one `GradientSource`, and then those of another, of the same parameters; means are put back."""

    def __init__(self, first: GradientSource, second: GradientSource) -> None:
        self.parts = (first, second)
        self.parameters: Mapping[str, int] = first.parameters
        self.n_samples = first.n_samples + second.n_samples
        self.numpy_row_dtype = max((part.numpy_row_dtype for part in self.parts), key=lambda dtype: dtype.itemsize)
        self.numpy_read_dtype = np.dtype(
            max((part.numpy_read_dtype for part in self.parts), key=lambda dtype: dtype.itemsize)
        )
        self.decoding_bytes = max(part.decoding_bytes for part in self.parts) + self.numpy_read_dtype.itemsize

    def chunk_columns(self, name: str) -> int:
        """Return the columns that are read together at no extra cost, by the one that reads more."""
        return max(part.chunk_columns(name) for part in self.parts)

    def columns(
        self, name: str, start: int, stop: int, rows: slice | None = None, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return (N, stop - start), or a range of those rows."""
        first, last, _ = (rows or slice(None)).indices(self.n_samples)
        stop = min(stop, self.parameters[name])
        if out is None:
            out = np.empty((last - first, stop - start), dtype=self.numpy_read_dtype)
        known = self.parts[0].n_samples
        for part, begin in zip(self.parts, (0, known), strict=True):
            left, right = max(first - begin, 0), min(last - begin, part.n_samples)
            if left >= right:
                continue
            place = out[left + begin - first : right + begin - first]
            found = part.columns(name, start, stop, slice(left, right))
            mean = part.mean(name, start, stop)
            place[:] = found if mean is None else found + mean
        return out

    def mean(self, name: str, start: int, stop: int) -> None:
        """Return `None`: a mean that was subtracted is put back."""

    def representation(self, name: str) -> str:
        """Return 'factors' where both have them, else 'dense'."""
        return "factors" if all(part.representation(name) == "factors" for part in self.parts) else "dense"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self.parts[0].shape(name)

    def segments(self, name: str) -> list[FactorSegment]:
        """Return the factors of a parameter, in the order of the samples."""
        first, second = self.parts
        moved = [
            dataclasses.replace(segment, start=segment.start + first.n_samples) for segment in second.segments(name)
        ]
        return [*first.segments(name), *moved]


@dataclass(frozen=True)
class CrossGram:
    """Products of a second source's rows with those of a first, and with each other."""

    cross: np.ndarray  # (N_second, N_first) float64
    own: np.ndarray  # (N_second, N_second) float64


def build_cross_grams(
    first: GradientSource,
    second: GradientSource,
    config: SpectralConfig,
    keys: Mapping[str, Sequence[str]],
    *,
    progress: bool = False,
) -> dict[str, CrossGram]:
    """Return the products of the rows of two sources for groups of parameters.

    Args:
        first: with N_first samples.
        second: of the same parameters.
        config: products, workers and memory budget.
        keys: group -> parameters whose products are added.
        progress: show a bar.

    Raises:
        CapacityError: the reduction does not fit the memory budget.
        CorruptRunError: stored gradients are missing or altered.
        RunError: they were deleted.
    """
    n = first.n_samples
    grown = {key: GrownGram(n, lambda _: np.zeros((n, n))) for key in keys}
    found = build_grams(JoinedRows(first, second), config, _CrossSink(n), keys=keys, grown=grown, progress=progress)
    return dict(found)


@dataclass(frozen=True)
class _CrossSink:
    """Keeps what is of the second rows; picklable for Dask workers."""

    known: int

    def __call__(self, finished: ParameterGram) -> tuple[str, CrossGram]:
        rows = finished.gram[self.known :]
        return finished.name, CrossGram(rows[:, : self.known].copy(), rows[:, self.known :].copy())
