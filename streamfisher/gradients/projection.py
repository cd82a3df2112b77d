"""Rows of K numbers instead of P: `G' = R_L^T G R_R` of a gradient G (m, n), random signs R_L (m, k1), R_R (n, k2).

Entries are +-1/sqrt(k1) and +-1/sqrt(k2), so `E <g'_i, g'_j> = <g_i, g_j>` and Grams of projected rows are unbiased
estimates of the exact ones. The product form lets a linear layer project its factors before they are multiplied, so
that a whole row never exists. Signs depend on the seed and the parameter's name alone, see `signs`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamfisher.gradients.factors import matrix_shape
from streamfisher.gradients.shapes import GradientShape


@dataclass(frozen=True)
class ProjectedShape:
    """The sizes of one parameter's projection; a side whose two sizes agree is left as it is."""

    m: int
    n: int
    k1: int
    k2: int

    @property
    def columns(self) -> int:
        """Return the numbers of a projected row, k1 k2 <= K."""
        return self.k1 * self.k2

    @property
    def relative_variance(self) -> float:
        """Return the most that `Var |g'|^2 / |g|^4` can be: `(1 + 2/k1)(1 + 2/k2) - 1`, 2/k being 0 on an exact side.

        It is that of Gaussian entries and a gradient of rank one; signs and higher ranks have less.
        """
        left = 0.0 if self.k1 == self.m else 2.0 / self.k1
        right = 0.0 if self.k2 == self.n else 2.0 / self.k2
        return (1.0 + left) * (1.0 + right) - 1.0


def projected_shape(shape: Sequence[int], numbers: int) -> ProjectedShape | None:
    """Return how a parameter of this shape is projected to at most `numbers`; `None` where it has no more than those.

    k1 and k2 are as nearly equal as m and n allow.
    """
    if math.prod(shape) <= numbers:
        return None
    m, n = matrix_shape(shape)
    k1 = min(m, math.isqrt(numbers))
    k2 = min(n, numbers // k1)
    return ProjectedShape(m, n, min(m, numbers // k2), k2)


def projected(shapes: Sequence[GradientShape], numbers: int | None) -> list[GradientShape]:
    """Return gradients as they are stored with `--project numbers`; `None` leaves them exact."""
    if numbers is None:
        return list(shapes)
    found = [projected_shape(shape.shape, numbers) for shape in shapes]
    return [
        shape if size is None else dataclasses.replace(shape, projected=size.columns)
        for shape, size in zip(shapes, found, strict=True)
    ]


def signs(seed: int, name: str, rows: int, columns: int) -> Tensor:
    """Return a matrix (rows, columns) of random +-1, int8 on the CPU.

    Philox counts through its bits with a key of the seed and the first 8 bytes of SHA-256 of `name`, and raw bits are
    the same in every version of NumPy: the same matrix on any device, any rank, in any run.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    counter = np.random.Philox(key=np.array([seed % 2**64, key], dtype=np.uint64))
    raw = counter.random_raw(-(-rows * columns // 64)).astype("<u8").view(np.uint8)
    bits = np.unpackbits(raw, count=rows * columns, bitorder="little").reshape(rows, columns)
    return torch.from_numpy(2 * bits.astype(np.int8) - 1)


@dataclass(frozen=True)
class Sides:
    """The two matrices of one parameter's projection on one device; `None`: that side is left as it is."""

    shape: ProjectedShape
    left: Tensor | None  # (m, k1)
    right: Tensor | None  # (n, k2)

    def project(self, values: Tensor) -> Tensor:
        """Return `R_L^T G_i R_R` of values (B, P): (B, k1 k2)."""
        matrices = values.reshape(-1, self.shape.m, self.shape.n)
        return self.project_right(self.project_left(matrices)).flatten(1)

    def project_left(self, values: Tensor) -> Tensor:
        """Return `R_L^T L_i` of values (B, m, T): (B, k1, T)."""
        return values if self.left is None else self.left.T @ values

    def project_right(self, values: Tensor) -> Tensor:
        """Return `R_i R_R` of values (B, T, n): (B, T, k2)."""
        return values if self.right is None else values @ self.right


class Projection:
    """The projections of all parameters that have more than `numbers` elements.

    Args:
        numbers: K, the most numbers of a row.
        seed: of the signs.
        shapes: of all captured parameters.
    """

    def __init__(self, numbers: int, seed: int, shapes: Mapping[str, Sequence[int]]) -> None:
        self.numbers, self.seed = numbers, seed
        found = {name: projected_shape(shape, numbers) for name, shape in shapes.items()}
        self.shapes: dict[str, ProjectedShape] = {name: shape for name, shape in found.items() if shape is not None}
        self._sides: dict[tuple[str, torch.device, torch.dtype], Sides] = {}

    @property
    def columns(self) -> dict[str, int]:
        """Return the numbers of a row of each parameter that is projected."""
        return {name: shape.columns for name, shape in self.shapes.items()}

    def sides(self, name: str, device: torch.device, dtype: torch.dtype) -> Sides:
        """Return the matrices of a parameter, made once for each device and dtype."""
        key = (name, device, dtype)
        if key not in self._sides:
            shape = self.shapes[name]
            left = None if shape.k1 == shape.m else self._matrix(f"{name}/L", shape.m, shape.k1)
            right = None if shape.k2 == shape.n else self._matrix(f"{name}/R", shape.n, shape.k2)
            put = [None if side is None else side.to(device=device, dtype=dtype) for side in (left, right)]
            self._sides[key] = Sides(shape, *put)
        return self._sides[key]

    def _matrix(self, name: str, rows: int, columns: int) -> Tensor:
        return signs(self.seed, name, rows, columns).double() / math.sqrt(columns)
