"""Norms in float64 of tensors that are too large to be copied in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from streamfisher.gradients.factors import FactorPair, squared_norms

_PART = 1 << 20  # elements that are in float64 at a time


def _wide(one: Tensor, other: Tensor | None) -> Tensor:
    wide = one.to(torch.float64, copy=True)
    return wide if other is None else wide.sub_(other)


def distance(one: Tensor | None, other: Tensor | None) -> float:
    """Return `|one - other|`, `None` being zero."""
    if one is None:
        one, other = other, None
    return 0.0 if one is None else norm(one, other)


def norm(one: Tensor, other: Tensor | None = None) -> float:
    """Return `|one - other|` (or `|one|`), Frobenius, formed in float64 part by part."""
    if one.numel() <= _PART:
        return float(torch.linalg.vector_norm(_wide(one.reshape(-1), None if other is None else other.reshape(-1))))
    parts = one.reshape(-1).split(_PART)
    others = [None] * len(parts) if other is None else other.reshape(-1).split(_PART)
    norms = [_wide(a, b).norm() for a, b in zip(parts, others, strict=True)]
    return float(torch.stack(norms).norm()) if norms else 0.0


def batch_norms(
    rows: Mapping[str, Tensor], factors: Mapping[str, Sequence[FactorPair]], n_samples: int
) -> dict[str, np.ndarray]:
    """Return the squared norm of each sample's gradient, parameter by parameter: (n_samples,) float64."""
    found = squared_norms_of({name: values[:n_samples] for name, values in rows.items()})
    for name, pairs in factors.items():
        found[name] = squared_norms(pairs).cpu().numpy() if pairs else np.zeros(n_samples)
    return found


def squared_norms_of(rows: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the squared norm of each row of each parameter: (n,) float64."""
    found = {}
    for name, values in rows.items():
        squared = torch.linalg.vecdot(values, values).double()
        extreme = ~((squared > 1e-30) & (squared < 1e30))
        if bool(extreme.any()):  # near the ends of float32's range the square is formed in float64
            wide = values[extreme].double()
            squared[extreme] = torch.linalg.vecdot(wide, wide)
        found[name] = squared.cpu().numpy()
    return found
