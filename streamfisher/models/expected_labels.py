"""Gradients of every class of a sample: the exact Fisher of a classifier, which is its generalised Gauss-Newton matrix.

With `p` the probabilities that a model gives to the classes of an input and `g_c` the gradient of `-log p_c`,

    E_{c ~ p} g_c g_c^T = sum_c (sqrt(p_c) g_c) (sqrt(p_c) g_c)^T = J^T (diag(p) - p p^T) J,      J = d logits / d theta
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_root_of_probability(losses: Tensor) -> Tensor:
    """Return the same losses `-log p`, `(B,)`, whose gradients are `sqrt(p)` times as large.

    A class of probability zero has a gradient of zero, and as its loss the largest number instead of infinity.
    """
    known = torch.where(torch.isposinf(losses), 0.0, losses)
    values = losses.detach()
    weights = torch.exp(values / -2)
    return torch.nan_to_num(values, nan=torch.nan, posinf=torch.finfo(values.dtype).max) + weights * (
        known - known.detach()
    )
