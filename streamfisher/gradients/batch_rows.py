"""What one pass fills: row buffers, where the first contribution overwrites and further ones are added; or factors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamfisher.gradients.factors import FactorPair, squared_norms

if TYPE_CHECKING:
    from streamfisher.gradients.projection import Sides


class RowSink:
    """Rows `(B, P_k)` of each parameter, filled by the rules while the backward pass runs.

    Tied parameters and modules that are called several times contribute more than once. A parameter that nothing
    contributed to has the gradient zero: `finish` writes it, because the buffers are reused. Of parameters in
    `factored` the factors are kept instead of their product. Those in `projected` are projected before they are
    multiplied, and their rows are `(B, k1 k2)`. With a `window`, only its samples are kept of the B of the pass.
    """

    def __init__(
        self,
        out: Mapping[str, Tensor],
        n_samples: int,
        shapes: Mapping[str, tuple[int, ...]],
        factored: Collection[str] = (),
        projected: Mapping[str, Sides] | None = None,
        window: slice | None = None,
    ) -> None:
        self.n_samples = n_samples
        self.window = window
        self._n_rows = n_samples if window is None else window.stop - window.start
        self.projected = dict(projected or {})
        self.rows = {name: out[name][: self._n_rows] for name in shapes if name not in factored}  # (B, P_k) each
        self.factors: dict[str, list[FactorPair]] = {name: [] for name in shapes if name in factored}
        self.shapes = dict(shapes)
        self.written: set[str] = set()

    def wants(self, name: str) -> bool:
        """Return whether this pass is to find the gradient of a parameter."""
        return name in self.shapes

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which products of this parameter are formed."""
        return self.rows[name].dtype

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add `left @ right`, `(B, m, T) @ (B, T, n)`, formed in the dtype of the rows, with m * n = P_k."""
        left, right = self._seen(left), self._seen(right)
        if name in self.factors:
            self.factors[name].append(FactorPair(left.transpose(1, 2), right))
            return
        rows = self.rows[name]
        left, right = left.to(rows.dtype), right.to(rows.dtype)
        if name in self.projected:
            sides = self.projected[name]
            left, right = sides.project_left(left), sides.project_right(right)
        self._multiply(name, left, right)

    def _multiply(self, name: str, left: Tensor, right: Tensor) -> None:
        rows = self.rows[name]
        target = rows.unflatten(1, (left.shape[1], right.shape[2]))
        if name in self.written:
            target.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=target)
            self.written.add(name)

    def add(self, name: str, value: Tensor) -> None:
        """Add `value` `(B, *shape)`."""
        if name in self.factors:
            raise ValueError(f"{name}: a rule formed a gradient that is no product of two factors")
        rows = self.rows[name]
        value = self._seen(value.reshape(self.n_samples, -1))
        if name in self.projected:
            value = self.projected[name].project(value.to(rows.dtype))
        if value.shape != rows.shape:
            raise ValueError(f"{name}: a rule formed {tuple(value.shape)} where {tuple(rows.shape)} is needed")
        if name in self.written:
            rows.add_(value)
        else:
            rows.copy_(value)
            self.written.add(name)

    def scatter(self, name: str, index: Tensor, value: Tensor) -> None:
        """Add `value` `(B, T, d)` into the table rows `index` `(B, T)` of a parameter of shape `(V, d)`."""
        index, value = self._seen(index), self._seen(value)
        if name in self.factors:
            self.factors[name].append(FactorPair(index, value))
            return
        rows = self.rows[name]
        n_entries, width = self.shapes[name]
        if name in self.projected:
            sides = self.projected[name]
            value, width = sides.project_right(value.to(rows.dtype)), sides.shape.k2
            if sides.left is not None:
                self._multiply(name, sides.left[index].transpose(1, 2), value)
                return
        if name not in self.written:
            rows.zero_()
            self.written.add(name)
        if rows.is_contiguous():
            offset = torch.arange(self._n_rows, device=index.device).unsqueeze(1) * n_entries
            flat = (index + offset).reshape(-1)
            rows.view(self._n_rows * n_entries, width).index_add_(0, flat, value.reshape(-1, width).to(rows.dtype))
            return
        for row, where, what in zip(rows, index, value, strict=True):
            row.view(n_entries, width).index_add_(0, where, what.to(rows.dtype))

    def _seen(self, values: Tensor) -> Tensor:
        return values if self.window is None else values[self.window]

    def formed(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return a tensor that is zero where a parameter's gradient is, of those that something contributed to."""
        formed = {name: self.rows[name] for name in names if name in self.written}
        pairs = {name: self.factors[name] for name in names if self.factors.get(name)}
        return formed | {name: squared_norms(factors) for name, factors in pairs.items()}

    def finish(self) -> None:
        """Write zeros where nothing contributed."""
        for name, rows in self.rows.items():
            if name not in self.written:
                rows.zero_()
