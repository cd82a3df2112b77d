"""Norms in float64 of tensors that are too large to be copied in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_PART = 1 << 20  # elements that are in float64 at a time


def _wide(one: Tensor, other: Tensor | None) -> Tensor:
    wide = one.to(torch.float64, copy=True)
    return wide if other is None else wide.sub_(other)


def norm(one: Tensor, other: Tensor | None = None) -> float:
    """Return `|one - other|` (or `|one|`), Frobenius, formed in float64 part by part."""
    parts = one.reshape(-1).split(_PART)
    others = [None] * len(parts) if other is None else other.reshape(-1).split(_PART)
    norms = [_wide(a, b).norm() for a, b in zip(parts, others, strict=True)]
    return float(torch.stack(norms).norm()) if norms else 0.0
