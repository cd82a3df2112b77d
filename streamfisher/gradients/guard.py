"""The guard: the rows of a batch add up to its ordinary gradient, or a rule does not hold for this batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamfisher.gradients.factors import FactorPair, squared_norms, total
from streamfisher.gradients.norms import distance, norm
from streamfisher.gradients.passes import GradientPasses


def differences(
    engine: GradientPasses,
    grads: Mapping[str, Tensor | None],
    rows: Mapping[str, Tensor],
    factors: Mapping[str, Sequence[FactorPair]],
) -> dict[str, float]:
    """Return how far the sums of per-sample gradients are from ordinary ones, relative to the rows' own size.

    Args:
        engine: its tolerance, floor and projection count here.
        grads: parameter -> the ordinary gradient of the batch, flat; `None` where it has none.
        rows: (B, P_k) of parameters that are held as rows.
        factors: of the other parameters.

    Returns:
        Parameter -> `|sum_i g_i - grad| / (sum_i |g_i|^2)^(1/2)`. A difference within the rounding of the whole
        gradient is scaled to lie below the tolerance.
    """
    projected = engine.projected(rows)
    sizes: dict[str, float] = {}  # rows may cancel in the sum: their own size is what rounding is relative to
    found: dict[str, float] = {}
    for name, grad in grads.items():
        value: Tensor | None
        if name in factors:
            pairs = factors[name]
            value = total(pairs, engine.parameters[name].shape, engine.row_dtype) if pairs else None
            sizes[name] = float(squared_norms(pairs).sum()) ** 0.5 if pairs else 0.0
        else:
            value = rows[name].sum(0, dtype=torch.float64)
            sizes[name] = norm(rows[name])
        # A projection is linear, so the sums agree as they do without.
        if grad is not None and engine.projection is not None and name in projected:
            side = engine.projection.sides(name, grad.device, torch.float64)
            grad = side.project(grad.double())[0]
        found[name] = distance(value, grad)
    rounding = sum(size**2 for size in sizes.values()) ** 0.5 * engine.floor / engine.tolerance
    scales = {name: max(size, rounding) for name, size in sizes.items()}
    return {name: found[name] / scale if scale else found[name] for name, scale in scales.items()}
