"""Metrics over growing prefixes of the samples: is N enough?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.errors import ConfigError
from streamfisher.results.analyses import Growth


def grow(grams: BlockGrams, sizes: Sequence[int] | None = None, *, seed: int = 42) -> Growth:
    """Solve nested subsets: the first samples of one seeded random order, each subset within the next.

    Args:
        grams: of all samples.
        sizes: of the subsets; `None` means N, N/2, N/4, ... down to 8.
        seed: of the order.

    Raises:
        ConfigError: a size is under 2 or over the number of samples.
    """
    n = len(grams.selection)
    if sizes is None:
        halves = [n >> shift for shift in range(12) if n >> shift >= 8]
        sizes = halves or [n]
    sizes = sorted(set(sizes))
    if not sizes or sizes[0] < 2 or sizes[-1] > n:
        raise ConfigError(f"growth sizes {sizes} must lie between 2 and the {n} samples that are selected.")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    return Growth(tuple(sizes), tuple(grams.subset(np.sort(order[:size])).spectrum() for size in sizes), seed)
