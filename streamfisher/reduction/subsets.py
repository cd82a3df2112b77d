"""Columns drawn at random, where a Gram is to be estimated from some of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ColumnSubset:
    """Columns of one parameter drawn at random, and the factor that keeps the expected Gram the true one."""

    columns: np.ndarray  # int64, ascending
    scale: float  # P_b / k: the Gram of the drawn columns is multiplied by it

    def inside(self, start: int, stop: int) -> np.ndarray:
        """Return which of the columns from `start` to `stop` were drawn, counted from `start`."""
        first, last = np.searchsorted(self.columns, [start, stop])
        return self.columns[first:last] - start


def draw_columns(
    parameters: Mapping[str, int], blocks: Mapping[str, Sequence[str]], max_params: int | None, seed: int
) -> dict[str, ColumnSubset]:
    """Draw at most `max_params` columns of each block, the same in every process and run.

    The generator is seeded with `seed` and the SHA-1 of the block's name. With k of P_b columns drawn, the Gram is
    scaled by P_b / k, so its expectation is the Gram of the whole block.

    Args:
        parameters: columns of each parameter.
        blocks: parameters of each block.
        max_params: k; `None` draws nothing.
        seed: of the run.

    Returns:
        The subset of each parameter of the blocks that are larger than `max_params`.
    """
    subsets: dict[str, ColumnSubset] = {}
    if max_params is None:
        return subsets
    for key, names in blocks.items():
        total = sum(parameters[name] for name in names)
        if total <= max_params:
            continue
        word = int.from_bytes(hashlib.sha1(key.encode()).digest()[:8], "little")
        generator = np.random.Generator(np.random.PCG64([seed, word]))
        drawn = np.sort(generator.choice(total, size=max_params, replace=False, shuffle=False))
        offset = 0
        for name in names:
            inside = drawn[(drawn >= offset) & (drawn < offset + parameters[name])] - offset
            subsets[name] = ColumnSubset(inside.astype(np.int64), total / max_params)
            offset += parameters[name]
    return subsets
