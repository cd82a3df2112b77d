"""What a stored run is asked about its samples: who carries an eigenvector, who is like whom, who moves what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streamfisher.analysis.analyses import Analyses
from streamfisher.analysis.block_grams import BlockGrams, SampleSpace, require_memory
from streamfisher.analysis.tiled_samples import samples_by_tiles
from streamfisher.errors import ConfigError, DataError
from streamfisher.influence.deletion import leave_one_out
from streamfisher.influence.leverage import effective_dimension, leverage_scores
from streamfisher.influence.similarity import clusters_of, inverse_norms, similar_pairs
from streamfisher.results.samples import LeaveOneOut, SampleAnalysis
from streamfisher.runtime.determinism import one_thread
from streamfisher.solving.centering import CENTERING_ROUNDING
from streamfisher.solving.selection import Selection

#: N x N matrices that the eigenvectors take, beside a stored Gram.
_MATRICES = 8
#: Dampings of leverage scores where none are given, relative to the largest eigenvalue.
RELATIVE_DAMPINGS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


class SampleAnalyses(Analyses):
    """The part of a run that answers questions about samples."""

    def samples(
        self,
        block: str = "global",
        top: int = 20,
        center: bool | None = None,
        *,
        block_structure: str | Mapping[str, str] | None = None,
        dampings: Sequence[float] | None = None,
        threshold: float = 0.99,
        most_pairs: int = 1000,
        texts: Sequence[str] | None = None,
        **options: Any,
    ) -> SampleAnalysis:
        """Return what the Gram of a block says of its samples: all exact, without rows and without the model.

        Eigenvectors in sample space and who carries them, leverage scores, near-duplicates, and the metrics that the
        Fisher would have without each of the samples.

        Args:
            block: its key, for example `layer_3`; 'global' is the whole model.
            top: leading eigenvectors; fewer where fewer eigenvalues lie above the noise floor.
            center: of the covariance instead of the Fisher.
            block_structure: see `block_grams`; `None` means the run's own, or 'none' for the block 'global'.
            dampings: of the leverage scores, in the units of the eigenvalues, not negative; `None` means the largest
                eigenvalue times 1, 0.1, 0.01, ..., as long as that is above the noise floor.
            threshold: of the cosine of near-duplicates, above 0 and at most 1.
            most_pairs: list no more than so many pairs of them.
            texts: (N,) what each sample of the run says, to be shown beside its number; `None` means what is stored.
            options: of `block_grams`: samples, weights, normalization, partial, config.

        Raises:
            RunError: the run holds projections, or columns are drawn.
            ConfigError: there is no such block, or an option is out of range.
            DataError: there is not one text for each sample of the run.
            CapacityError: the Gram and its eigenvectors do not fit the memory budget.
            StreamfisherError: as `block_grams`.
        """
        _check_samples_options(top, dampings, threshold, most_pairs)
        self.require_exact("what single samples do", options.get("config"))
        grams = self.block_grams(structure_of(block, block_structure), center, **options)
        return self.samples_of(grams, block, top, dampings, threshold, most_pairs, texts)

    def samples_of(
        self,
        grams: BlockGrams,
        block: str,
        top: int = 20,
        dampings: Sequence[float] | None = None,
        threshold: float = 0.99,
        most_pairs: int = 1000,
        texts: Sequence[str] | None = None,
    ) -> SampleAnalysis:
        """Return what `samples` does of Grams that are at hand, whose choice of samples, weights and centering counts.

        Raises:
            ConfigError: there is no such block.
            DataError: there is not one text for each sample of the run.
            CapacityError: the Gram and its eigenvectors do not fit the memory budget.
        """
        said = texts_of(self.texts if texts is None else texts, self.n_samples, grams.selection.samples)
        if not grams.fits(_MATRICES):
            if dampings is not None:
                require_memory(
                    8 * (grams.n_stored**2 + _MATRICES * len(grams.selection) ** 2),
                    f"leverage scores take all eigenvectors, and those of {len(grams.selection)} samples",
                    grams.config,
                )
            numbers = grams.selection.samples
            fields = {name: values[numbers] for name, values in self.store.samples.fields().items()}
            return samples_by_tiles(grams, block, top, threshold, most_pairs, fields, said)
        space = grams.sample_space(block)
        with one_thread(grams.config.use_deterministic):
            return self._samples_of(grams, space, top, dampings, threshold, most_pairs, said)

    def _samples_of(
        self,
        grams: BlockGrams,
        space: SampleSpace,
        top: int,
        dampings: Sequence[float] | None,
        threshold: float,
        most_pairs: int,
        texts: tuple[str, ...] | None,
    ) -> SampleAnalysis:
        spectrum, selection, n = space.spectrum, grams.selection, len(grams.selection)
        rank = int(spectrum.above_floor.sum())
        k = min(top, rank)
        loadings = space.vectors[:, :k].copy()
        loadings *= np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(k)])
        chosen = _dampings(spectrum.eigenvalues, spectrum.noise_floor) if dampings is None else np.array(dampings)
        largest = float(space.K.diagonal().max(initial=0.0))
        inverse = inverse_norms(space.K, CENTERING_ROUNDING * largest if grams.center else 0.0)
        places, cosines, n_pairs = similar_pairs(space.K, threshold, inverse, most_pairs)
        weights = np.ones(n) if selection.weights is None else selection.weights
        return SampleAnalysis(
            block=spectrum.name,
            samples=selection.samples,
            fields={name: values[selection.samples] for name, values in self.store.samples.fields().items()},
            texts=texts,
            eigenvalues=spectrum.eigenvalues[:k],
            loadings=loadings,
            trace=spectrum.trace,
            noise_floor=spectrum.noise_floor,
            squared_norms=space.K.diagonal() / (weights * selection.factor),
            masses=weights / selection.denominator,
            dampings=chosen,
            leverages=leverage_scores(space.vectors, spectrum.eigenvalues, chosen, spectrum.noise_floor)
            if len(chosen)
            else np.zeros((0, n)),
            effective_dimensions=effective_dimension(spectrum.eigenvalues, chosen, spectrum.noise_floor),
            without=_without(space, selection, rank, center=grams.center) if n > 2 else None,
            threshold=threshold,
            pairs=selection.samples[places],
            pair_cosines=cosines,
            n_pairs=n_pairs,
            cluster=clusters_of(space.K, threshold, inverse),
            n_params=spectrum.n_params,
            centered=grams.center,
            metadata=grams.metadata,
        )


def structure_of(block: str, structure: str | Mapping[str, str] | None) -> str | Mapping[str, str] | None:
    """Return the block structure that a block is of: the whole model is the one block of 'none'."""
    return "none" if structure is None and block == "global" else structure


def texts_of(texts: Sequence[str] | None, n_samples: int, numbers: np.ndarray) -> tuple[str, ...] | None:
    """Return the texts of some samples.

    Raises:
        DataError: there is not one text for each sample of the run.
    """
    if texts is None:
        return None
    if len(texts) != n_samples:
        raise DataError(f"{len(texts)} texts were given and the run has {n_samples} samples; give one for each.")
    return tuple(str(texts[number]) for number in numbers)


def _without(space: SampleSpace, selection: Selection, rank: int, *, center: bool) -> LeaveOneOut:
    """Return the metrics of the Fisher without each sample, normalised by what is left."""
    n, spectrum = len(selection), space.spectrum
    rho = np.ones(n)
    if center:  # the mean moves too
        weights = np.ones(n) if selection.weights is None else selection.weights
        rho = 1.0 / (1.0 - weights / weights.sum())
    found = leave_one_out(space.vectors[:, :rank], spectrum.eigenvalues[:rank], rho, space.K.diagonal() / n)
    left = selection.denominator - selection.added()
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(left > 0, selection.denominator / left, np.nan)  # nothing is left to divide by
    metrics = spectrum.metrics
    whole = {name: float(metrics[name]) for name in ("largest_eigenvalue", "trace", "effective_rank")}
    return LeaveOneOut(found.largest * scale, found.trace * scale, found.effective_rank, whole)


def _dampings(values: np.ndarray, floor: float) -> np.ndarray:
    """Return powers of ten of the largest eigenvalue that lie above the noise floor; none of a block without one."""
    largest = float(values[0]) if len(values) else 0.0
    found = np.array([largest * factor for factor in RELATIVE_DAMPINGS])
    return found[found > floor]


def check_dampings(dampings: Sequence[float]) -> None:
    """Refuse dampings that are none.

    Raises:
        ConfigError: one is negative or not finite.
    """
    for damping in dampings:
        if not np.isfinite(damping) or damping < 0:
            raise ConfigError(f"damping={damping}: a damping must be finite and not negative.")


def _check_samples_options(top: int, dampings: Sequence[float] | None, threshold: float, most_pairs: int) -> None:
    if top < 1:
        raise ConfigError(f"top={top}: ask for at least 1 eigenvector.")
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold={threshold}: the cosine of near-duplicates must be above 0 and at most 1.")
    if most_pairs < 0:
        raise ConfigError(f"most_pairs={most_pairs} must not be negative.")
    check_dampings(dampings or ())
