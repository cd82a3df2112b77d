"""Frozen results about directions in parameter space: how much of each lies in leading eigenspaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streamfisher.results.metrics import json_values


@dataclass(frozen=True)
class BlockDirections:
    """Shares of directions in the leading eigenvectors of one block."""

    eigenvalues: np.ndarray  # (k,) float64, descending
    shares: np.ndarray  # (m, k) float64: of each eigenvector in each direction's part in this block
    squared_norms: np.ndarray  # (m,) float64, of the directions' parts in this block
    rounding: np.ndarray  # (m,) float64, estimate of the error of the whole share by rounding
    standard_errors: np.ndarray | None  # (m,) float64, of the whole share over resamples; None: none were drawn
    n_params: int

    @property
    def total(self) -> np.ndarray:
        """Return the share in all k eigenvectors together, (m,)."""
        return np.asarray(self.shares.sum(axis=1))

    @property
    def expected_of_random(self) -> float:
        """Return what a random direction would have: k / P."""
        return min(len(self.eigenvalues) / self.n_params, 1.0) if self.n_params else 0.0


@dataclass(frozen=True)
class DirectionAnalysis:
    """Directions against the leading eigenspaces of the blocks of a run."""

    directions: tuple[str, ...]  # 'mean gradient', 'update', 'query 17'
    blocks: Mapping[str, BlockDirections]
    centered: bool
    n_resamples: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        blocks: dict[str, Any] = {}
        for key, part in self.blocks.items():
            rows = []
            for place, name in enumerate(self.directions):
                errors = part.standard_errors
                rows.append(
                    {
                        "direction": name,
                        "share": float(part.total[place]),
                        "rounding": float(part.rounding[place]),
                        "standard_error": None if errors is None else float(errors[place]),
                        "squared_norm": float(part.squared_norms[place]),
                        "shares": part.shares[place].tolist(),
                    }
                )
            blocks[key] = {
                "k": len(part.eigenvalues),
                "n_params": part.n_params,
                "expected_of_random": part.expected_of_random,
                "eigenvalues": part.eigenvalues.tolist(),
                "directions": rows,
            }
        content = {
            "blocks": blocks,
            "centered": self.centered,
            "n_resamples": self.n_resamples,
            "metadata": dict(self.metadata),
        }
        found: dict[str, Any] = json_values(content)
        return found
