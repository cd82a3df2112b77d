"""Metrics over growing prefixes of the samples: is N enough?"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.subset_sums import SubsetSums
from streamfisher.errors import ConfigError
from streamfisher.results.analyses import Growth
from streamfisher.results.spectrum import Spectrum
from streamfisher.runtime.stage_progress import steps

#: An eigensolve of twice the size takes eight times as long.
_DOUBLED = 8.0
#: How subsets are solved, for what the run keeps of them.
_BY = "Grams of a subset"


def half(grams: BlockGrams, seed: int = 42) -> SubsetSums | None:
    """Return the place for sums of the largest subset but all that `grow` solves; `None` where they do not fit."""
    numbers, of = np.unique(grams.selection.inputs, return_inverse=True)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(numbers))
    subset = grams.subset(_of_inputs(of, order[: len(numbers) >> 1]))
    return SubsetSums(subset) if SubsetSums.fit(subset) else None


def _of_inputs(of: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the places of all samples of the inputs that are chosen, in order; `of` is the input of each sample."""
    return np.flatnonzero(np.isin(of, chosen))


def grow(
    grams: BlockGrams,
    sizes: Sequence[int] | None = None,
    *,
    seed: int = 42,
    seconds: float | None = None,
    known: Spectrum | None = None,
    sums: SubsetSums | None = None,
) -> Growth:
    """Solve nested subsets: the first samples of one seeded random order, each subset within the next.

    Args:
        grams: of all samples.
        sizes: of the subsets, in inputs where a sample is one class of one; `None` means N, N/2, N/4, ... down to 8.
        seed: of the order.
        seconds: from the smallest on, leave out what is expected to take longer in all; `None` solves every size.
        known: the spectrum of all samples, where it is at hand.
        sums: of `half`, where those were read before.

    Raises:
        ConfigError: a size is under 2 or over the number of samples.
    """
    numbers, of = np.unique(grams.selection.inputs, return_inverse=True)
    n = len(numbers)
    if sizes is None:
        halves = [n >> shift for shift in range(12) if n >> shift >= 8]
        sizes = halves or [n]
    sizes = sorted(set(sizes))
    if not sizes or sizes[0] < 2 or sizes[-1] > n:
        raise ConfigError(f"growth sizes {sizes} must lie between 2 and the {n} samples that are selected.")
    start = time.monotonic()
    spectra = {n: known} if known is not None and sizes[-1] == n else {}
    missing = [size for size in sizes if size not in spectra]
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    last, took = 0, 0.0
    below = max((size for size in missing if size < n), default=0)
    for size in steps(missing, "growth curves", show=grams.progress, n_samples=missing[-1] if missing else 0):
        subset = grams.subset(_of_inputs(of, order[:size]))
        kept = subset.kept(whole=True, by=_BY)
        if kept is not None:
            spectra[size] = subset.combined(kept, whole=True)
            continue
        expected = took * _DOUBLED ** np.log2(size / last) if last else 0.0
        begun = time.monotonic()
        if seconds is not None and begun - start + expected > seconds:
            break
        if size < n and (sums is None or not sums.has(subset)):
            sums = SubsetSums.of(grams.subset(_of_inputs(of, order[:below])))
            begun = time.monotonic()
        solutions = subset.solutions(whole=True) if sums is None or size == n else sums.solutions(subset)
        last, took = size, time.monotonic() - begun
        subset.keep(solutions, took, whole=True, by=_BY)
        spectra[size] = subset.combined(solutions, whole=True)
    solved = tuple(sorted(spectra))
    left_out = tuple(size for size in sizes if size not in spectra)
    return Growth(solved, tuple(spectra[size] for size in solved), seed, left_out)
