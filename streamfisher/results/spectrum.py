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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import require
from streamfisher.results.bootstrap import Bootstrap
from streamfisher.results.frames import FrameKind, dataset, frame
from streamfisher.results.metric_attributes import MetricAttributes
from streamfisher.results.metrics import effective_rank, json_values, shape_metrics
from streamfisher.results.notebook import result_html, spectrum_html
from streamfisher.results.panels import draw_eigenvalues
from streamfisher.runtime.durable import replacing

#: Name and key of the matrix of all parameters together; that of the union of blocks is `global`.
WHOLE_MODEL = "whole_model"

NORMALIZATION = {False: "(1/N) * G^T G", True: "(1/N) * (G - mean)^T (G - mean)"}

#: What forward and backward passes multiply a unit roundoff by: in the size of a row, and in a singular value's place.
_ROW_ERROR = 192.0
_AMPLIFICATION = 32.0


@dataclass(frozen=True)
class BlockSpectrum(MetricAttributes):
    """Eigenvalues of one block of the Fisher, F_b = (1/N) G_b^T G_b, or of all blocks together."""

    name: str
    eigenvalues: np.ndarray  # (r,) float64, descending; r = min(N, P) unless `truncated`
    trace: float  # sum of all eigenvalues, exact also when truncated
    noise_floor: float  # eigenvalues below it are rounding, see docs/concepts.md; the highest block's for a union
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
    residuals: np.ndarray | None = (
        None  # (r,) float64, |F v - lambda v|: an eigenvalue lies within it; None: all solved
    )
    solved_side: str = "samples"  # of the N x N matrix; 'parameters': of the P x P one
    error_bars: dict[str, float | None] | None = None  # metric -> relative error of a projected run; None: exact
    floor_source: str = "unknown"  # what rounds the most, or 'eps' where that raised the floor
    error: float = 0.0  # absolute error of an eigenvalue by products, solver and stored rows, see `noise.Floor`
    row_scale: float = 0.0  # what the rows hold beside lambda_1 that rounding is relative to: their mean, their layer
    block_errors: np.ndarray | None = None  # (r,) float64, of a union: `relative_errors` of the blocks
    no_gradient: bool = False  # every gradient of its parameters is exactly zero

    @property
    def relative_errors(self) -> np.ndarray:
        """Return an estimate of each eigenvalue's relative error, (r,) float64; infinite below the noise floor.

        Forward and backward passes leave a relative error of some u in every row and move a singular value by some
        `u sigma_1` (Weyl) of the rows as they were, their mean and the rest of their layer included; products and the
        rounding of stored rows move an eigenvalue by about `eps(product) lambda_1 + u^2 trace / N`:

            u (192 + 32 sqrt((lambda_1 + row_scale) / lambda_k)) + error / lambda_k

        and an iterative solver by no more than its residual, which is added. In a union each eigenvalue has the error
        that it has in its block.

        The two factors are what small float32 models showed (`tests/benchmarks/precision.py`), with room. What a
        bfloat16 or float16 model rounds before a row is formed is not counted.
        """
        if self.block_errors is not None:
            return self.block_errors
        errors = np.full(len(self.eigenvalues), np.inf)
        values = self.eigenvalues[self.above_floor]
        if len(values):
            scale = self.eigenvalues[0] + self.row_scale
            rows = self.roundoff * (_ROW_ERROR + _AMPLIFICATION * np.sqrt(scale / values))
            errors[self.above_floor] = rows + self.error / values
            if self.residuals is not None:
                errors[self.above_floor] += self.residuals[self.above_floor] / values
        return errors

    def with_floor(self, floor: float, source: str) -> BlockSpectrum:
        """Return the block with its noise floor raised to `floor`, where it was lower."""
        if floor <= self.noise_floor:
            return self
        above = self.eigenvalues > floor
        return dataclasses.replace(self, noise_floor=floor, floor_source=source, above_floor=above)

    @property
    def metrics(self) -> dict[str, Any]:
        """Return the block's metrics as plain values; JSON files have `null` for what is infinite.

        - `largest_eigenvalue`, `second_eigenvalue`: lambda_1, lambda_2 (0 where there is no second);
        - `smallest_eigenvalue`: the smallest above the noise floor, 0 where none is;
        - `spectral_gap`: lambda_1 - lambda_2;
        - `condition_number`: lambda_1 over the smallest eigenvalue above the noise floor; infinite where none is;
        - `effective_rank`: exp(H(p)), p the eigenvalues above the floor over their sum (Roy and Vetterli, 2007); 1, of
          no entropy, where none is, and `reason` says so;
        - `numerical_rank`: how many eigenvalues lie above the noise floor;
        - `noise_floor`, `noise_floor_source`: the floor, and which rounding it is, or `eps` where that raised it;
        - `trace`: the sum of all eigenvalues, that is, the mean squared gradient norm;
        - `top_eigenvalues`: the largest ones, descending;
        - stable rank, participation ratio, cumulative variance and power law: see `metrics.shape_metrics`.
        """
        values = self.eigenvalues
        significant = values[self.above_floor]
        second = float(values[1]) if len(values) > 1 else 0.0
        largest = float(values[0]) if len(values) else 0.0
        reason = self.reason or (None if len(significant) else "no eigenvalue lies above the noise floor")
        return {
            "block_name": self.name,
            "n_samples": self.n_samples,
            "n_params": self.n_params,
            "n_eigenvalues": len(values),
            "largest_eigenvalue": largest,
            "second_eigenvalue": second,
            "smallest_eigenvalue": self._smallest,
            "spectral_gap": largest - second,
            "condition_number": self._condition_number,
            "effective_rank": None if self.truncated else effective_rank(significant) or 1.0,
            "numerical_rank": len(significant) if not self.truncated else None,
            "noise_floor": self.noise_floor,
            "noise_floor_source": self.floor_source,
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
            "solved_side": self.solved_side,
            **({"largest_residual": float(self.residuals.max())} if self.residuals is not None else {}),
            **({"reason": reason} if reason else {}),
        }

    def _repr_html_(self) -> str:
        shown = {name: value for name, value in self.metrics.items() if not isinstance(value, list)}
        return result_html(f"Block {self.name}", ("metric", "value"), list(shown.items()))

    def __repr__(self) -> str:
        return (
            f"BlockSpectrum({self.name!r}, {len(self.eigenvalues)} eigenvalues, N={self.n_samples}, P={self.n_params}, "
            f"trace={self.trace:.4g})"
        )

    @property
    def _smallest(self) -> float | None:
        significant = self.eigenvalues[self.above_floor]
        return None if self.truncated else float(significant[-1]) if len(significant) else 0.0

    @property
    def _condition_number(self) -> float | None:
        smallest = self._smallest
        return float(self.eigenvalues[0]) / smallest if smallest else None if self.truncated else math.inf


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a Fisher or covariance under one block structure."""

    blocks: dict[str, BlockSpectrum]
    global_: BlockSpectrum  # the union of the blocks' eigenvalues
    metadata: dict[str, Any] = field(default_factory=dict)
    bootstrap: Bootstrap | None = None  # intervals of the metrics, where they were asked for
    solved_whole: BlockSpectrum | None = None  # all parameters together, where there are several blocks

    @property
    def whole(self) -> BlockSpectrum | None:
        """Return the spectrum of all parameters together, not block diagonal: of rank N at most.

        `None` where it was not solved beside the blocks: Grams that are read by tiles, blocks of different samples.
        """
        return self.global_ if len(self.blocks) < 2 else self.solved_whole

    def __getitem__(self, key: str) -> BlockSpectrum:
        """Return a block by its key, `global` for the union of blocks, or `whole_model`.

        Raises:
            KeyError: there is no such block; the message names those that are.
        """
        if key in self.blocks:
            return self.blocks[key]
        if key == "global":
            return self.global_
        if key == WHOLE_MODEL and self.whole is not None:
            return self.whole
        raise KeyError(f"there is no block {key!r}; the blocks are {', '.join(self.blocks)}")

    def __iter__(self) -> Iterator[str]:
        """Yield the keys of the blocks."""
        return iter(self.blocks)

    def __len__(self) -> int:
        """Return how many blocks there are."""
        return len(self.blocks)

    def __bool__(self) -> bool:
        """Return `True`: a spectrum without blocks is a result too."""
        return True

    def __contains__(self, key: object) -> bool:
        """Return whether `spectrum[key]` is there."""
        return key in self.blocks or key == "global" or (key == WHOLE_MODEL and self.whole is not None)

    def keys(self) -> list[str]:
        """Return the keys of the blocks."""
        return list(self.blocks)

    def values(self) -> list[BlockSpectrum]:
        """Return the blocks."""
        return list(self.blocks.values())

    def items(self) -> list[tuple[str, BlockSpectrum]]:
        """Return keys and blocks."""
        return list(self.blocks.items())

    def _ipython_key_completions_(self) -> list[str]:
        return [*self.blocks, *(key for key in ("global", WHOLE_MODEL) if key in self and key not in self.blocks)]

    def plot(self, ax: Any = None) -> Any:
        """Draw the eigenvalues of every block and of the whole model; return the matplotlib Axes.

        Args:
            ax: the Axes to draw on; `None` means those of a new figure.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        require("matplotlib", "plots", "draw the spectrum")
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots(figsize=(6.4, 5.0), layout="constrained")[1]
        draw_eigenvalues(ax, self)
        return ax

    def to_frame(self, kind: FrameKind = "metrics") -> Any:
        """Return a pandas DataFrame: `metrics` with a row per block, or `eigenvalues` with a row for each.

        Raises:
            ConfigError: the kind is unknown.
            MissingExtraError: pandas is not installed.
        """
        return frame(self, kind)

    def to_xarray(self) -> Any:
        """Return an xarray Dataset: eigenvalues by `block` and `index`, which counts from 1, and metrics by `block`.

        Raises:
            MissingExtraError: xarray is not installed.
        """
        return dataset(self)

    @property
    def reached(self) -> dict[str, BlockSpectrum]:
        """Return the blocks that a gradient reached, of which tables and files tell; all, where none was reached.

        The others' parameters are named in the metadata, as `parameters_without_gradient`.
        """
        return {key: block for key, block in self.blocks.items() if not block.no_gradient} or dict(self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Return `{'global', 'whole_model', 'per_block', 'metadata'}` as plain values, with every eigenvalue.

        `global` is the union of the blocks, the block-diagonal matrix, which may have more than N eigenvalues;
        `whole_model` the matrix of all parameters together, `None` where it was not solved. A condition number may be
        infinite; `to_json` writes `null` for it.
        """
        union = _of_all(self.global_)
        whole = None if self.whole is None else _of_all(self.whole) | {"block_name": WHOLE_MODEL}
        per_block = {name: _with_eigenvalues(block) for name, block in self.reached.items()}
        metadata = self.metadata
        if self.bootstrap is not None:
            union["intervals"] = self.bootstrap.global_.to_dict()
            if whole is not None:
                found = self.bootstrap.whole or self.bootstrap.global_
                whole["intervals"] = found.to_dict()
            for name, values in per_block.items():
                values["intervals"] = self.bootstrap.blocks[name].to_dict()
            metadata = metadata | {"bootstrap": self.bootstrap.facts()}
        return {"global": union, "whole_model": whole, "per_block": per_block, "metadata": metadata}

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict()` as JSON, the same bytes for the same spectrum; return the path."""
        return write_spectra([self], path)

    def _repr_html_(self) -> str:
        return spectrum_html(self)

    def __repr__(self) -> str:
        whole = self.global_
        return (
            f"Spectrum({len(self.blocks)} blocks, N={whole.n_samples}, P={whole.n_params}, trace={whole.trace:.4g}, "
            f"largest={whole.metrics['largest_eigenvalue']:.4g})"
        )


def _of_all(block: BlockSpectrum) -> dict[str, Any]:
    """Return what `_with_eigenvalues` does, with what only the whole has."""
    found = _with_eigenvalues(block)
    largest = found["largest_eigenvalue"]
    return found | {
        "n_total_eigenvalues": found["n_eigenvalues"],
        "total_params": found["n_params"],
        "gd_convergence_scale": 1.0 / largest if largest > 0 else math.inf,
    }


def _with_eigenvalues(block: BlockSpectrum) -> dict[str, Any]:
    """Return a block's metrics with all its eigenvalues, and their residuals where an iterative solver gave them."""
    found = block.metrics | {"eigenvalues": [float(value) for value in block.eigenvalues]}
    if block.residuals is not None:
        found["residuals"] = [float(value) for value in block.residuals]
    if block.error_bars is not None:
        found["error_bars"] = dict(block.error_bars)
    return found


def write_spectra(spectra: Iterable[Spectrum], path: str | Path) -> Path:
    """Write one spectrum as itself, several as a list under `spectra`; deterministic bytes, strict JSON."""
    contents = [spectrum.to_dict() for spectrum in spectra]
    content = contents[0] if len(contents) == 1 else {"spectra": contents}
    path = Path(path)
    with replacing(path) as partial:
        partial.write_text(json.dumps(json_values(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path
