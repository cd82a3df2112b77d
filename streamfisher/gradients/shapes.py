"""What the per-sample gradient of each parameter is made of: the sizes that decide how it is held and multiplied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from streamfisher.gradients.factors import FactorPair, pack


@dataclass(frozen=True)
class Factor:
    """One side of a factored gradient: `(T, width)` values, or token ids `(T,)`."""

    key: str  # sides with the same key are one tensor and are stored once (q, k and v share their input)
    width: int  # values stored per position; 1 for token ids
    itemsize: int  # bytes of a stored value


@dataclass(frozen=True)
class GradientShape:
    """One parameter, and the factors of its gradient where it has any."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the parameter in the model
    pairs: tuple[tuple[Factor, Factor], ...] = ()  # (L, R) of each use: g_i = sum_t L_it^T R_it; (): rows only
    positions: tuple[float, ...] = ()  # mean number of positions of a sample, of each use
    projected: int | None = None  # numbers of a row that is projected; None: the row is exact

    @property
    def numel(self) -> int:
        """Return P_k."""
        return int(torch.Size(self.shape).numel())

    @property
    def columns(self) -> int:
        """Return the numbers of a row as it is stored."""
        return self.numel if self.projected is None else self.projected


def shapes_of_batch(
    parameters: Mapping[str, tuple[tuple[int, ...], torch.dtype]], factors: Mapping[str, Sequence[FactorPair]]
) -> list[GradientShape]:
    """Return the shapes of all parameters, as a batch's own factors show them.

    Args:
        parameters: name -> shape and dtype, in the model's order.
        factors: of those parameters that have any; B samples.
    """
    packed = pack(factors)
    found = []
    for name, (shape, dtype) in parameters.items():
        pairs, positions = [], []
        for left, right in packed.pairs.get(name, ()):
            pairs.append((_factor(left, packed.tensors[left]), _factor(right, packed.tensors[right])))
            positions.append(sum(packed.lengths[left]) / max(len(packed.lengths[left]), 1))
        found.append(GradientShape(name, tuple(shape), dtype, tuple(pairs), tuple(positions)))
    return found


def _factor(key: str, tensor: torch.Tensor) -> Factor:
    if tensor.dim() == 1:
        return Factor(key, 1, 4)
    return Factor(key, tensor.shape[1], tensor.element_size())
