"""Frozen results beside spectra: growth, density, alignment, comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from streamfisher.results.metrics import SCALAR_METRICS, json_values
from streamfisher.results.notebook import result_html
from streamfisher.results.spectrum import WHOLE_MODEL, BlockSpectrum, Spectrum

Scale = Literal["log", "linear"]


@dataclass(frozen=True)
class Growth:
    """Spectra of nested subsets of the samples: whether N was enough."""

    sizes: tuple[int, ...]  # ascending; the last is all
    spectra: tuple[Spectrum, ...]  # one per size
    seed: int  # of the order in which samples are taken
    left_out: tuple[int, ...] = ()  # sizes that would have taken longer than was allowed

    def curve(self, metric: str, block: str | None = None) -> np.ndarray:
        """Return a metric at each size, (len(sizes),) float64, NaN where undefined.

        Args:
            metric: its name.
            block: a key; `None` is the union of the blocks, `whole_model` all parameters together, where it was solved.
        """
        return _metric_of(self.spectra, metric, block)

    def to_dict(self) -> dict[str, Any]:
        """Return `{sizes, left_out, seed, curves: {name: {metric: [value at each size]}}}` as plain JSON values."""
        names: list[str | None] = [None, *self.spectra[0].blocks]
        curves = {
            "global" if name is None else name: {
                metric: [None if np.isnan(value) else float(value) for value in self.curve(metric, name)]
                for metric in SCALAR_METRICS
            }
            for name in names
        }
        return {"sizes": list(self.sizes), "left_out": list(self.left_out), "seed": self.seed, "curves": curves}

    def _repr_html_(self) -> str:
        key = WHOLE_MODEL if all(spectrum.solved_whole is not None for spectrum in self.spectra) else None
        shown = ("trace", "largest_eigenvalue", "effective_rank", "stable_rank")
        curves = [[float(value) for value in self.curve(metric, key)] for metric in shown]
        rows = list(zip(self.sizes, *curves, strict=True))
        return result_html(f"Growth of the {'whole model' if key else 'union of blocks'}", ("samples", *shown), rows)


@dataclass(frozen=True)
class SpectralDensity:
    """How many eigenvalues of a block lie where: an estimate, with the standard error over its random vectors."""

    block: str
    grid: np.ndarray  # (g,) float64, ascending: eigenvalues, or their log10 for `scale='log'`
    density: np.ndarray  # (g,) eigenvalues per unit of `grid`
    standard_error: np.ndarray  # (g,) of the density, over vectors
    quadrature_error: np.ndarray  # (g,) how far half as many steps are from it: an estimate from above
    edges: np.ndarray  # (b + 1,) float64, eigenvalues: whole decades, or ten equal parts of a linear scale
    counts: np.ndarray  # (b,) eigenvalues between them, not smoothed
    count_errors: np.ndarray  # (b,) standard errors of the counts
    count_quadrature_errors: np.ndarray  # (b,) how far half as many steps are from them
    below: float  # eigenvalues under the start of a log scale, zeros among them; 0 for a linear one
    below_standard_error: float
    n_eigenvalues: int  # the integral of the density, and `below`; exact
    n_vectors: int
    n_steps: int  # of Lanczos
    sigma: float  # width of the Gaussians, in units of `grid`
    scale: Scale
    seed: int
    solved_side: str = "samples"

    @property
    def integral(self) -> float:
        """Return the integral of the density over the grid, by the trapezoidal rule."""
        return float(np.trapezoid(self.density, self.grid))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()
        } | {"integral": self.integral}

    def _repr_html_(self) -> str:
        decades = zip(self.edges[:-1], self.edges[1:], self.counts, self.count_errors, strict=True)
        rows = [[float(value) for value in row] for row in decades]
        title = f"Spectral density of {self.block}: {self.n_eigenvalues} eigenvalues, {self.n_vectors} vectors"
        return result_html(title, ("from", "to", "eigenvalues", "standard error"), rows)


@dataclass(frozen=True)
class Alignment:
    """Normalised inner products of the Grams of all pairs of blocks."""

    blocks: tuple[str, ...]
    matrix: np.ndarray  # (B, B) float64, symmetric, 0 to 1, diagonal 1; NaN where a block has no gradient
    centered: bool
    n_samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `null` where a block has no gradient."""
        rows = [[float(value) if np.isfinite(value) else None for value in row] for row in self.matrix]
        return {
            "blocks": list(self.blocks),
            "matrix": rows,
            "centered": self.centered,
            "n_samples": self.n_samples,
        }

    def _repr_html_(self) -> str:
        rows = [[name, *map(float, row)] for name, row in zip(self.blocks, self.matrix, strict=True)]
        return result_html(f"Alignment of blocks, {self.n_samples} samples", ("", *self.blocks), rows)


@dataclass(frozen=True)
class Overlap:
    """Principal angles between the k leading eigenspaces of one block in two runs."""

    block: str
    runs: tuple[str, str]
    cosines: np.ndarray  # (k,) float64, descending, 0 to 1
    n_params: int

    @property
    def k(self) -> int:
        """Return the dimension of the spaces."""
        return len(self.cosines)

    @property
    def mean_squared_cosine(self) -> float:
        """Return `|V_A V_B^T|_F^2 / k`: 1 for the same space, k / P expected for random ones."""
        return float(np.mean(self.cosines**2))

    @property
    def angles(self) -> np.ndarray:
        """Return the principal angles in degrees, ascending, (k,) float64."""
        angles: np.ndarray = np.degrees(np.arccos(np.clip(self.cosines, 0.0, 1.0)))
        return angles

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "block": self.block,
            "runs": list(self.runs),
            "k": self.k,
            "mean_squared_cosine": self.mean_squared_cosine,
            "expected_of_random": min(self.k / self.n_params, 1.0),
            "cosines": [float(value) for value in self.cosines],
            "angles_in_degrees": [float(value) for value in self.angles],
        }

    def _repr_html_(self) -> str:
        rows = [[k, float(c), float(a)] for k, (c, a) in enumerate(zip(self.cosines, self.angles, strict=True), 1)]
        title = f"Overlap of {self.block} in {' and '.join(self.runs)}: {self.mean_squared_cosine:.4g}"
        return result_html(title, ("angle", "cosine", "degrees"), rows)


@dataclass(frozen=True)
class Comparison:
    """Two or more runs under one block structure."""

    labels: tuple[str, ...]  # of the runs
    spectra: tuple[Spectrum, ...]
    shared_blocks: tuple[str, ...]  # keys that every run has
    overlaps: tuple[Overlap, ...]  # of each run with the next, for blocks of the same parameters
    warnings: tuple[str, ...]  # what keeps the numbers from being compared at face value

    def trajectory(self, metric: str, block: str | None = None) -> np.ndarray:
        """Return a metric in each run, (R,) float64, NaN where undefined.

        Args:
            metric: its name.
            block: a key; `None` is the union of the blocks, `whole_model` all parameters together.
        """
        return _metric_of(self.spectra, metric, block)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: for every block and metric one value per run, and intervals where asked for."""
        blocks: dict[str, Any] = {}
        several = all(spectrum.solved_whole is not None for spectrum in self.spectra)
        for key in (*self.shared_blocks, None, *([WHOLE_MODEL] if several else [])):
            members = [_member(spectrum, key) for spectrum in self.spectra]
            metrics = [member.metrics for member in members]
            entry: dict[str, Any] = {name: json_values([found[name] for found in metrics]) for name in SCALAR_METRICS}
            drawn = [spectrum.bootstrap for spectrum in self.spectra if spectrum.bootstrap is not None]
            if len(drawn) == len(self.spectra):
                of_block = [found.of(member.name) for found, member in zip(drawn, members, strict=True)]
                entry["intervals"] = [{} if found is None else found.to_dict() for found in of_block]
            blocks["global" if key is None else key] = entry
        return {
            "runs": list(self.labels),
            "blocks": blocks,
            "overlaps": [overlap.to_dict() for overlap in self.overlaps],
            "warnings": list(self.warnings),
            "metadata": [spectrum.metadata for spectrum in self.spectra],
        }

    def _repr_html_(self) -> str:
        shown = ("trace", "largest_eigenvalue", "effective_rank", "stable_rank")
        rows = []
        for key in (*self.shared_blocks, None):
            for label, spectrum in zip(self.labels, self.spectra, strict=True):
                metrics = _member(spectrum, key).metrics
                rows.append([key or "union of blocks", label, *(metrics[name] for name in shown)])
        return result_html(f"{len(self.labels)} runs", ("block", "run", *shown), rows)


def _member(spectrum: Spectrum, key: str | None) -> BlockSpectrum:
    """Return a block, the union for `None`, or the whole model where no block has its name."""
    if key == WHOLE_MODEL and key not in spectrum.blocks and spectrum.whole is not None:
        return spectrum.whole
    return spectrum.global_ if key is None else spectrum.blocks[key]


def _metric_of(spectra: Sequence[Spectrum], metric: str, block: str | None) -> np.ndarray:
    members = [_member(spectrum, block) for spectrum in spectra]
    values = [member.metrics[metric] for member in members]
    return np.array([np.nan if value is None or np.isinf(value) else value for value in values], dtype=np.float64)
