"""Eigenvalues to metrics, blocks to the whole.

Formulas, with N samples, block b of P_b parameters, and K_b the N x N Gram of the block's gradient rows:

    F_b = (1/N) G_b^T G_b            eigenvalues of K_b / N, and zeros
    C_b = (1/N) (G_b - m)^T (G_b - m)   eigenvalues of H K_b H / N, H = I - 1 1^T / N

The Fisher with blocks is block diagonal, so its eigenvalues are the union of the blocks' eigenvalues.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from streamfisher import eigen
from streamfisher.config import SpectralConfig
from streamfisher.metrics import effective_rank, frobenius, shape_metrics
from streamfisher.noise import noise_floor

if TYPE_CHECKING:
    from streamfisher.uncertainty import Bootstrap

NORMALIZATION = {False: "(1/N) * G^T G", True: "(1/N) * (G - mean)^T (G - mean)"}

#: What forward and backward passes multiply a unit roundoff by: in the size of a row, and in a singular value's place.
_ROW_ERROR = 192.0
_AMPLIFICATION = 32.0
#: Centering by H K H with float32 products loses digits in proportion to N |mean|^2 over the trace of the covariance;
#: at this ratio the error of an eigenvalue reaches about 1e-4.
MEAN_DOMINANCE_LIMIT = 1000.0


@dataclass(frozen=True)
class BlockSpectrum:
    """Eigenvalues of one block of the Fisher, F_b = (1/N) G_b^T G_b, or of all blocks together."""

    name: str
    eigenvalues: np.ndarray  # (r,) float64, descending; r = min(N, P) unless `truncated`
    trace: float  # sum of all eigenvalues, exact also when truncated
    noise_floor: float  # eigenvalues below it are rounding, see docs/concepts.md; the largest block's for a union
    above_floor: np.ndarray  # (r,) bool, which eigenvalues are above the noise floor of their own block
    n_samples: int
    n_params: int
    truncated: bool = False  # only the largest eigenvalues are listed
    solver: str = "lapack-syevd"
    jitter: float = 0.0  # relative jitter that the solver needed; 0 normally
    roundoff: float = 2.0**-24  # unit roundoff of the rows
    reason: str | None = None  # why the spectrum is empty, where it is
    top_k: int = 100  # how many eigenvalues `metrics` lists
    norm: float | None = None  # |F|_F, root of the sum of all squared eigenvalues; None: from those listed

    @property
    def relative_errors(self) -> np.ndarray:
        """Return an estimate of each eigenvalue's relative error, (r,) float64; infinite below the noise floor.

        Forward and backward passes leave a relative error of some u in every row and move a singular value by some
        `u sigma_1` (Weyl); products move an eigenvalue by about `eps(product) lambda_1`:

            u (192 + 32 sqrt(lambda_1 / lambda_k)) + floor / (N lambda_k)

        The two factors are what small float32 models showed (`tests/benchmarks/precision.py`), with room. What a
        bfloat16 or float16 model rounds before a row is formed is not counted.
        """
        errors = np.full(len(self.eigenvalues), np.inf)
        values = self.eigenvalues[self.above_floor]
        if len(values):
            rows = self.roundoff * (_ROW_ERROR + _AMPLIFICATION * np.sqrt(self.eigenvalues[0] / values))
            errors[self.above_floor] = rows + self.noise_floor / (self.n_samples * values)
        return errors

    def with_floor(self, floor: float) -> BlockSpectrum:
        """Return the block with its noise floor raised to `floor`, where it was lower."""
        if floor <= self.noise_floor:
            return self
        return dataclasses.replace(self, noise_floor=floor, above_floor=self.eigenvalues > floor)

    @property
    def metrics(self) -> dict[str, Any]:
        """Return the block's metrics as plain JSON values.

        - `largest_eigenvalue`, `second_eigenvalue`: lambda_1, lambda_2 (0 where there is no second);
        - `spectral_gap`: lambda_1 - lambda_2;
        - `condition_number`: lambda_1 over the smallest eigenvalue above the noise floor; `null` where none is;
        - `effective_rank`: exp(H(p)), p the eigenvalues above the floor over their sum (Roy and Vetterli, 2007);
        - `numerical_rank`: how many eigenvalues lie above the noise floor;
        - `trace`: the sum of all eigenvalues, that is, the mean squared gradient norm;
        - `top_eigenvalues`: the largest ones, descending;
        - stable rank, participation ratio, cumulative variance and power law: see `metrics.shape_metrics`.
        """
        values = self.eigenvalues
        significant = values[self.above_floor]
        second = float(values[1]) if len(values) > 1 else 0.0
        largest = float(values[0]) if len(values) else 0.0
        return {
            "n_samples": self.n_samples,
            "n_params": self.n_params,
            "n_eigenvalues": len(values),
            "largest_eigenvalue": largest,
            "second_eigenvalue": second,
            "spectral_gap": largest - second,
            "condition_number": largest / float(significant[-1]) if len(significant) and not self.truncated else None,
            "effective_rank": effective_rank(significant) if not self.truncated else None,
            "numerical_rank": len(significant) if not self.truncated else None,
            "noise_floor": self.noise_floor,
            "top_eigenvalues": [float(value) for value in values[: self.top_k]],
            "trace": self.trace,
            **shape_metrics(
                values,
                self.above_floor,
                self.trace,
                float(np.linalg.norm(values)) if self.norm is None else self.norm,
                truncated=self.truncated,
            ),
            "truncated": self.truncated,
            "solver": self.solver,
            "jitter": self.jitter,
            **({"reason": self.reason} if self.reason else {}),
        }


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a Fisher or covariance under one block structure."""

    blocks: dict[str, BlockSpectrum]
    global_: BlockSpectrum  # the union of the blocks' eigenvalues
    metadata: dict[str, Any] = field(default_factory=dict)
    bootstrap: Bootstrap | None = None  # intervals of the metrics, where they were asked for

    def to_dict(self) -> dict[str, Any]:
        """Return `{'global', 'per_block', 'metadata'}` as plain JSON values, with every eigenvalue."""
        whole = {**self.global_.metrics, "eigenvalues": [float(value) for value in self.global_.eigenvalues]}
        whole["n_total_eigenvalues"] = whole["n_eigenvalues"]
        whole["total_params"] = whole["n_params"]
        largest = whole["largest_eigenvalue"]
        whole["gd_convergence_scale"] = 1.0 / largest if largest > 0 and math.isfinite(1.0 / largest) else None
        per_block = {
            name: {**block.metrics, "eigenvalues": [float(value) for value in block.eigenvalues]}
            for name, block in self.blocks.items()
        }
        metadata = self.metadata
        if self.bootstrap is not None:
            whole["intervals"] = self.bootstrap.global_.to_dict()
            for name, values in per_block.items():
                values["intervals"] = self.bootstrap.blocks[name].to_dict()
            metadata = metadata | {"bootstrap": self.bootstrap.facts()}
        return {"global": whole, "per_block": per_block, "metadata": metadata}

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict()` as JSON, the same bytes for the same spectrum; return the path."""
        return write_spectra([self], path)

    def _repr_html_(self) -> str:
        from streamfisher.html_report import spectrum_html

        return spectrum_html(self)

    def __repr__(self) -> str:
        whole = self.global_
        return (
            f"Spectrum({len(self.blocks)} blocks, N={whole.n_samples}, P={whole.n_params}, trace={whole.trace:.4g}, "
            f"largest={whole.metrics['largest_eigenvalue']:.4g})"
        )


def write_spectra(spectra: Iterable[Spectrum], path: str | Path) -> Path:
    """Write one spectrum as itself, several as a list under `spectra`; deterministic bytes, strict JSON."""
    contents = [spectrum.to_dict() for spectrum in spectra]
    content = contents[0] if len(contents) == 1 else {"spectra": contents}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def center(K: np.ndarray) -> np.ndarray:
    """Return H K H, the Gram of centered rows: row and column means removed."""
    means = K.mean(axis=0)
    centered = K - means[None, :] - means[:, None] + means.mean()
    return (centered + centered.T) / 2


def uncenter(K: np.ndarray, mean_products: np.ndarray) -> np.ndarray:
    """Return the Gram of rows `c_i + m` from that of rows `c_i`.

    Args:
        K: (N, N), `<c_i, c_j>`.
        mean_products: (N + 1,), `<c_i, m>` and, last, `<m, m>`.
    """
    products = mean_products[:-1]
    return K + products[None, :] + products[:, None] + mean_products[-1]


def block_spectrum(
    name: str,
    K: np.ndarray,
    n_params: int,
    config: SpectralConfig,
    *,
    product: torch.dtype,
    roundoff: float,
    top_k: int | None = None,
) -> BlockSpectrum:
    """Solve one block.

    Args:
        name: the block's key.
        K: (N, N) float64, the Gram of the block's rows, centered where the covariance is asked for.
        n_params: P_b, the number of columns the Gram is made of.
        config: solver options.
        product: dtype of the products that made `K`.
        roundoff: unit roundoff of the rows as they are held.
        top_k: list the largest `top_k` only; the trace stays that of all.
    """
    n = K.shape[0]
    count = min(n, n_params)
    if count < 1:
        reason = "no parameters in this block" if n_params < 1 else "no samples"
        return BlockSpectrum(name, np.zeros(0), 0.0, 0.0, np.zeros(0, dtype=bool), n, n_params, reason=reason)
    solved = eigen.solve(
        K, dtype=config.dtype_eigensolve, device=config.eigensolve_device, regularization=config.regularization
    )
    trace = float(np.trace(K)) / n
    values = solved.values[:count] / n
    floor = noise_floor(float(values[0]), trace, n, product=product, roundoff=roundoff, eps=config.eps)
    truncated = top_k is not None and top_k < count
    values = values[:top_k] if truncated else values
    return BlockSpectrum(
        name,
        values,
        trace,
        floor,
        values > floor,
        n,
        n_params,
        truncated=truncated,
        solver=solved.solver,
        jitter=solved.jitter,
        roundoff=roundoff,
        top_k=config.top_k_eigenvalues,
        norm=frobenius(K) / n,
    )


def union(blocks: Mapping[str, BlockSpectrum], top_k: int) -> BlockSpectrum:
    """Return the spectrum of the block-diagonal Fisher: the union of the blocks' eigenvalues, never an average."""
    members = list(blocks.values())
    if len(members) == 1:
        only = members[0]
        return dataclasses.replace(only, name="global")
    values = np.concatenate([block.eigenvalues for block in members])
    above = np.concatenate([block.above_floor for block in members])
    order = np.argsort(values, kind="stable")[::-1]
    return BlockSpectrum(
        "global",
        values[order],
        float(sum(block.trace for block in members)),
        max(block.noise_floor for block in members),
        above[order],
        members[0].n_samples,
        sum(block.n_params for block in members),
        truncated=any(block.truncated for block in members),
        solver=", ".join(sorted({block.solver for block in members})),
        jitter=max(block.jitter for block in members),
        roundoff=max(block.roundoff for block in members),
        top_k=top_k,
        norm=math.hypot(*(block.norm or 0.0 for block in members)),
    )


def block_diagonal_error(blocks_squared: float, whole_squared: float) -> float | None:
    """Return the relative Frobenius error of the block-diagonal approximation, |F - blockdiag F| / |F|.

    `|F|^2 = |K|^2 / N^2` and `|blockdiag F|^2 = sum_b |K_b|^2 / N^2`, both exact.

    Args:
        blocks_squared: sum over blocks of the squared Frobenius norm of their Grams.
        whole_squared: squared Frobenius norm of the Gram of all parameters.
    """
    if whole_squared <= 0:
        return None
    return math.sqrt(max(whole_squared - blocks_squared, 0.0) / whole_squared)
