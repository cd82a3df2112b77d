"""The guard: the rows of a batch add up to its ordinary gradient, or a rule does not hold for this batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamfisher.gradients.factors import FactorPair, squared_norms, total
from streamfisher.gradients.norms import distance, norm
from streamfisher.gradients.passes import GradientPasses


class Comparison:
    """How far the sums of per-sample gradients are from ordinary ones, relative to the rows' own size.

    Args:
        engine: its tolerance, floor and projection count here.
        rows: (B, P_k) of parameters that are held as rows.
        factors: of the other parameters.
    """

    def __init__(
        self, engine: GradientPasses, rows: Mapping[str, Tensor], factors: Mapping[str, Sequence[FactorPair]]
    ) -> None:
        self.engine, self.rows, self.factors = engine, rows, factors
        self._projected = engine.projected(rows)
        self._sizes: dict[str, float] = {}  # rows may cancel in the sum: their own size is what rounding is relative to
        self._found: dict[str, float] = {}

    def take(self, name: str, grad: Tensor | None) -> None:
        """Compare the ordinary gradient of a parameter, flat; `None` where it has none. The last one counts."""
        value: Tensor | None
        if name in self.factors:
            pairs = self.factors[name]
            value = total(pairs, self.engine.parameters[name].shape, self.engine.row_dtype) if pairs else None
            self._sizes[name] = float(squared_norms(pairs).sum()) ** 0.5 if pairs else 0.0
        else:
            value = self.rows[name].sum(0, dtype=torch.float64)
            self._sizes[name] = norm(self.rows[name])
        # A projection is linear, so the sums agree as they do without.
        if grad is not None and self.engine.projection is not None and name in self._projected:
            side = self.engine.projection.sides(name, grad.device, torch.float64)
            grad = side.project(grad.double())[0]
        self._found[name] = distance(value, grad)

    def differences(self) -> dict[str, float]:
        """Return parameter -> `|sum_i g_i - grad| / (sum_i |g_i|^2)^(1/2)`.

        A difference within the rounding of the whole gradient is scaled to lie below the tolerance.
        """
        whole = sum(size**2 for size in self._sizes.values()) ** 0.5
        rounding = whole * self.engine.guard_floor / self.engine.guard_tolerance
        scales = {name: max(size, rounding) for name, size in self._sizes.items()}
        return {name: self._found[name] / scale if scale else self._found[name] for name, scale in scales.items()}
