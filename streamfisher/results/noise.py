"""Below which eigenvalue rounding decides: from the dtypes of rows, products and the backward pass."""

from __future__ import annotations

import torch

#: One percent of error is reached where an eigenvalue is this many times the variance that rounding the rows added.
_ROUNDING_MARGIN = 100.0


def noise_floor(
    largest: float, trace: float, n_samples: int, *, product: torch.dtype, roundoff: float, eps: float | None = None
) -> float:
    """Return the eigenvalue below which rounding decides.

    Two sources: products in `product` precision leave about `eps(product) N lambda_1`; rows rounded with
    unit roundoff u add a white spectrum of `u^2` times the mean eigenvalue `trace / N`, which is 1 % at a hundred times
    that. The larger counts.

    Args:
        largest: lambda_1.
        trace: of the same matrix.
        n_samples: N.
        product: dtype of the slab products.
        roundoff: u, of the rows as they are held.
        eps: a floor relative to lambda_1 to use instead.
    """
    if eps is not None:
        return eps * largest
    rounding = _ROUNDING_MARGIN * roundoff**2 * trace / max(n_samples, 1)
    return max(float(torch.finfo(product).eps) * n_samples * largest, rounding)


def backward_noise(computed: torch.dtype, trace: float) -> float:
    """Return the eigenvalue that rounding in the backward pass can make up: u^2 times the trace of the whole model.

    Some gradients are zero in exact arithmetic and rounding in practice (a bias added to every key of an attention
    layer, which the softmax cancels). Their spectrum has a shape like any other; only its size against the whole tells.

    Args:
        computed: dtype of the backward pass; u is its unit roundoff.
        trace: of the Fisher of all parameters together.
    """
    return (float(torch.finfo(computed).eps) / 2) ** 2 * trace
