"""How the Gram of a parameter is made whose gradients are held as factors, `g_i = sum_t L_it^T R_it`.

    slabs      rows are formed a slab of columns at a time and multiplied as rows are:
               2 M m n + N^2 m n operations, M positions in all, L (T, m), R (T, n)
    pairwise   <g_i, g_j> = sum_{t,s} (L_it . L_js)(R_it . R_js), rows never exist:  M^2 (m + n)
    by token   where L is one-hot (an embedding), only positions of the same token meet:
               at most M N n, after adding up each sample's positions of that token

Slabs and tokens go by parts of the columns of one factor. Each part gives an N x N sum of its own; which rank or
worker makes it is all the same. Kernel and parts follow from sizes alone, so neither the memory budget nor the number
of workers or ranks changes a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from streamfisher.reduction.slabs import sums_bytes
from streamfisher.store.factors import FactorSegment
from streamfisher.store.layout import PANEL

Kernel = Literal["slabs", "pairwise", "tokens"]

#: Columns of one part of a factor, of slabs: they are in memory at a time, for all positions.
PART = 1024
#: A slab of formed rows is at most so many bytes of float32, and at most so many panels wide.
_SLAB_BYTES = 64 << 20
_SLAB_PANELS = 16
#: Bytes of the sums of one part, by token.
_TOKEN_BYTES = 64 << 20
#: float64 products against float32 ones.
FLOAT64_COST = 2.0


@dataclass(frozen=True)
class FactorUse:
    """How the factors of a parameter are used by all samples."""

    shape: tuple[int, int]  # (m, n), of a gradient
    n_samples: int
    positions: int  # M, of all samples and uses
    by_index: int = 0  # uses whose left factor is one-hot
    uses: int = 1

    @property
    def by_token(self) -> bool:
        """Return whether every left factor is one-hot."""
        return 0 < self.by_index == self.uses

    @property
    def is_turned(self) -> bool:
        """Return whether slabs are taken of `g_i^T = sum_t R_it^T L_it`, whose Gram is the same.

        So that parts are of the longer side, which gives more of them, and the shorter one is what stays in memory;
        where one part has all columns of either, there is nothing to win.
        """
        return not self.by_index and self.shape[0] > max(self.shape[1], PART)

    @property
    def turned(self) -> tuple[int, int]:
        """(m, n) as slabs are taken."""
        return self.shape[::-1] if self.is_turned else self.shape


def use_of(segments: Sequence[FactorSegment], shape: tuple[int, int], n_samples: int) -> FactorUse:
    """Return how a parameter's factors are used.

    Args:
        segments: all of them.
        shape: (m, n), of a gradient.
        n_samples: N.
    """
    by_index = sum(segment.left.dtype is None for segment in segments)
    positions = sum(sum(segment.lengths) for segment in segments)
    return FactorUse(shape, n_samples, positions, by_index, len(segments))


def choose_kernel(use: FactorUse, *, single: bool) -> Kernel:
    """Return the way that takes the fewest operations; where `single`, slabs are multiplied in float32."""
    return cheapest_kernel(use.positions, use.shape, use.n_samples, by_token=use.by_token, single=single)


def cheapest_kernel(
    positions: float, shape: tuple[int, int], n_samples: int, *, by_token: bool, single: bool
) -> Kernel:
    """Return the way that takes the fewest operations, see `choose_kernel`: what plans and runs both ask.

    Args:
        positions: of all samples and uses.
        shape: (m, n), of a gradient.
        n_samples: N.
        by_token: every left factor is one-hot.
        single: slabs would be multiplied in float32.
    """
    if by_token:
        return "tokens"
    slabs, pairwise = kernel_operations(positions, shape, n_samples)
    return "pairwise" if pairwise * (FLOAT64_COST if single else 1.0) < slabs else "slabs"


def kernel_operations(positions: float, shape: tuple[int, int], n_samples: int) -> tuple[float, float]:
    """Return the floating-point operations of the slab form and of the pairwise form."""
    m, n = shape
    return (2.0 * positions + n_samples**2) * m * n, positions**2 * (m + n)


def parts_of(kernel: Kernel, use: FactorUse) -> list[tuple[int, int]]:
    """Return the first column and one past the last of each part: of the right factor, of slabs as they are turned."""
    n = use.turned[1] if kernel == "slabs" else use.shape[1]
    width = {"slabs": PART, "tokens": token_columns(use.positions), "pairwise": n}[kernel]
    return [(start, min(start + width, n)) for start in range(0, n, max(width, 1))]


def token_columns(positions: int) -> int:
    """Return the columns of one part of an embedding's gradients."""
    return max(64, _TOKEN_BYTES // (32 * max(positions, 1)) // 64 * 64)


def slab_heights(turned: tuple[int, int], n_samples: int) -> tuple[int, int]:
    """Return (rows of W, columns of W) of one slab: fixed by the sizes."""
    width = min(turned[1], PART)
    columns = min(max(_SLAB_BYTES // (4 * n_samples), PANEL), _SLAB_PANELS * PANEL)
    return max(1, min(columns // width, turned[0])), width


def slab_memory(use: FactorUse, itemsize: int) -> tuple[int, int]:
    """Return the least bytes that the slab form needs, and those that let it read every factor once."""
    height, width = slab_heights(use.turned, use.n_samples)
    rows = use.n_samples * height * width
    fixed = use.positions * width * itemsize + rows * itemsize + sums_bytes(use.n_samples)
    return fixed + use.positions * height * itemsize, fixed + use.positions * use.turned[0] * itemsize


def least_kernel_bytes(kernel: Kernel, use: FactorUse, longest: int, itemsize: int) -> int:
    """Return the least bytes in which one worker makes the Gram of a parameter's factors.

    Args:
        kernel: how.
        use: of the factors.
        longest: positions of the largest batch.
        itemsize: bytes of a number of a formed row.
    """
    if kernel == "slabs":
        return slab_memory(use, itemsize)[0]
    if kernel == "tokens":
        return sums_bytes(use.n_samples) + 32 * use.positions * min(token_columns(use.positions), use.shape[1])
    return sums_bytes(use.n_samples) + 24 * longest * sum(use.shape)  # the factors of two batches
