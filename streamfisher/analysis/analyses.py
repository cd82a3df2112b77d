"""What can be asked of a stored run: spectra, alignment of blocks, growth curves, eigenvectors; without the model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from streamfisher.analysis.alignment import align
from streamfisher.analysis.block_grams import BlockGrams, stored_gram
from streamfisher.analysis.bootstrap import bootstrap as resample
from streamfisher.analysis.eigenvectors import compute_eigenvectors
from streamfisher.analysis.growth import grow
from streamfisher.analysis.partial_run import PartialGrams
from streamfisher.analysis.projection_errors import with_error_bars
from streamfisher.analysis.solved_spectra import SolvedSpectra
from streamfisher.analysis.unstored_grams import UnstoredGrams
from streamfisher.blocks.gram_keys import check_grouping, layers_of
from streamfisher.blocks.structures import assign_blocks
from streamfisher.config import UNCENTERED, SpectralConfig
from streamfisher.errors import ConfigError, CorruptRunError, RunError
from streamfisher.reduction.gram import gram_settings
from streamfisher.reduction.product_dtypes import float32_grams
from streamfisher.results.analyses import Alignment, Growth, Scale, SpectralDensity
from streamfisher.results.spectrum import Spectrum
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.solving.selection import Normalization, SampleChoice, select
from streamfisher.solving.solve import RowPrecision
from streamfisher.store import Manifest, RunStore
from streamfisher.store.eigenvectors import Eigenvectors
from streamfisher.store.grams import GramStore
from streamfisher.store.moments import Moment
from streamfisher.store.texts import read_texts


class Analyses:
    """The part of `Run` that answers questions; `Run` brings the store and builds the Grams."""

    store: RunStore
    manifest: Manifest
    config: SpectralConfig
    parameters: Any  # a property of `Run`: {parameter name: number of elements}
    n_samples: Any  # a property of `Run`: N
    build_grams: Any
    metadata: Any
    _unstored: tuple[dict[str, Any], UnstoredGrams] | None = None  # settings, and Grams that were made for an answer

    def block_grams(
        self,
        block_structure: str | Mapping[str, str] | None = None,
        center: bool | None = None,
        samples: SampleChoice = None,
        *,
        weights: Sequence[float] | np.ndarray | None = None,
        normalization: Normalization = "samples",
        partial: bool = False,
        config: SpectralConfig | None = None,
        progress: bool = False,
    ) -> BlockGrams:
        """Return the Grams of the blocks, built where they are missing; what every analysis starts from.

        Grams of other settings than the run's own are built in memory, and what is stored stays as it is.

        Args:
            block_structure: 'layer', 'module', 'parameter', 'none', or a mapping from glob pattern to block key; `None`
                means the run's own.
            center: the covariance of gradients instead of the Fisher; `None` means the run's own.
            samples: a slice, sample numbers or a boolean mask over the N samples; `None` means all that are valid.
            weights: (N,) not negative; F = sum w_i g_i g_i^T / sum w_i. `None` means 1 each.
            normalization: divide by 'samples', or by 'tokens': the number of target tokens of the samples.
            partial: accept an unfinished run and take the samples that are there; the result says so.
            config: solver and Gram options; `None` means those the run was made with.
            progress: show bars while Grams are built and blocks are solved.

        Raises:
            ConfigError: the structure or the normalization is unknown.
            DataError: fewer than 2 samples are selected, or the weights cannot be used.
            RunError: the run is not fully collected and `partial` was not asked for.
            CorruptRunError: something stored is missing or altered.
        """
        config = self.config if config is None else SpectralConfig.of(config)
        structure = config.block_structure if block_structure is None else block_structure
        center = config.center_gradients if center is None else center
        if center and "classes_per_input" in self.manifest.data:
            raise ConfigError(f"{self.store.path} is of labels='expected' and has no covariance: {UNCENTERED}")
        keys = self.store.gram_members
        assignment = check_grouping(keys, assign_blocks(self.parameters, structure), per=self.config.gram_per)
        unfinished = PartialGrams(self.store, config) if partial and not self.store.markers.is_collected else None
        valid = self.store.samples.per_sample("valid") == 1
        counted = valid & ~self.is_query
        selection = select(
            self.n_samples,
            counted if unfinished is None else counted & unfinished.mask,
            samples,
            weights,
            normalization=normalization,
            n_targets=self.store.samples.per_sample("n_targets"),
            parts=self.manifest.data.get("classes_per_input", 1),
        )
        source: GramStore | PartialGrams | UnstoredGrams
        source = unfinished if unfinished is not None else self._grams(config, progress=progress)
        metadata = self.metadata(config) | selection.facts() | {"partial": unfinished is not None}
        if unfinished is not None:
            metadata["samples_collected"] = unfinished.rows.n_samples
        if samples is not None:
            metadata["samples"] = f"{len(selection)} selected of {self.n_samples}"
        if self.is_query.any():
            metadata["n_queries"] = int((valid & self.is_query).sum())
        metadata["block_structure"] = structure if isinstance(structure, str) else dict(structure)
        return BlockGrams(
            gram_of=lambda name: stored_gram(source, name, center),
            parameters={key: sum(self.parameters[name] for name in members) for key, members in keys.items()},
            assignment=assignment,
            selection=selection,
            center=center,
            config=config,
            precision=RowPrecision(self.store.row_dtype, self.store.rows.unit_roundoff),
            metadata=metadata,
            single=float32_grams(self.store, config, as_rows=unfinished is not None),
            layers=layers_of(keys),
            tile_of=None if isinstance(source, PartialGrams) else source.tile,
            mean_products_of=(lambda name: None)
            if center or isinstance(source, PartialGrams)
            else source.mean_products,
            moment_of=self._moments(source, config, int(valid.sum())),
            progress=progress,
            solved=SolvedSpectra(self.store.spectra) if isinstance(source, GramStore) else None,
        )

    @property
    def texts(self) -> tuple[str, ...] | None:
        """Return what each sample says, in as many characters as were asked for (N,); `None`: nobody asked.

        Raises:
            CorruptRunError: they are not what was written.
        """
        return read_texts(self.store.path, self.n_samples, self.config.store_text)

    @property
    def is_query(self) -> np.ndarray:
        """Return which samples were added as queries and count in no spectrum: (N,) bool."""
        found = np.zeros(self.n_samples, dtype=bool)
        for start, stop in self.manifest.data.get("queries", []):
            found[start:stop] = True
        return found

    def _moments(
        self, source: GramStore | PartialGrams | UnstoredGrams, config: SpectralConfig, n_valid: int
    ) -> Callable[[str], Moment | None]:
        """Return what reads moments; drawn columns and unfinished runs have none, one from before is of other rows."""
        if isinstance(source, PartialGrams) or config.max_params_per_block is not None:
            return lambda name: None

        def moment_of(name: str) -> Moment | None:
            moment = source.moment(name)
            if moment is not None and moment.count != n_valid:  # it would pass for that of a choice of samples
                raise CorruptRunError(
                    f"{self.store.path}: the moment of {name} is of {moment.count} samples, and {n_valid} are valid; "
                    "`streamfisher gram --rebuild` remakes it."
                )
            return moment

        return moment_of

    def _grams(self, config: SpectralConfig, *, progress: bool) -> GramStore | UnstoredGrams:
        """Return the Grams that `config` asks for, from the run, or for this answer only.

        Those that are missing are built and stored, if they are of the run's own settings. Stored Grams are never
        replaced by those of other settings because somebody looks at the run; `build_grams` does that.

        Raises:
            RunError: the run is not fully collected.
        """
        self.store.markers.require_collected()
        settings = gram_settings(config)
        if self._unstored is not None and self._unstored[0] == settings:
            return self._unstored[1]
        done = self.store.grams.done(settings)
        if len(done) == len(self.store.gram_members):
            return self.store.grams
        may_write = not isinstance(self.store.path, RemotePath) and os.access(self.store.path, os.W_OK)
        if settings == gram_settings(self.config) and not self._would_replace() and may_write:
            self.build_grams(config, progress=progress)
            return self.store.grams
        unstored = UnstoredGrams(self.store, config, progress=progress)
        self._unstored = (settings, unstored)
        return unstored

    def _would_replace(self) -> bool:
        """Return whether a Gram of all samples is stored that was made with other settings than the run's own."""
        settings = gram_settings(self.config)
        markers = [self.store.grams.marker(key) for key in self.store.gram_members]
        return any(
            marker.get("n_samples") == self.n_samples and marker.get("settings") != settings for marker in markers
        )

    def _require_stored(self, config: SpectralConfig) -> None:
        """Refuse Grams that are not the stored ones, where what is written into the run names those it is made of.

        Raises:
            RunError: the stored ones were made with other settings.
        """
        settings = gram_settings(config)
        for key in self.store.gram_members:
            marker = self.store.grams.marker(key)
            if marker.get("n_samples") == self.n_samples and marker.get("settings") != settings:
                raise RunError(
                    f"{self.store.path}: the stored Gram of {key} was made with {marker.get('settings')}, not with "
                    f"{settings}, and eigenvectors are of the stored ones. `streamfisher gram` with the same options "
                    "replaces them."
                )
        self.build_grams(config)

    def require_exact(self, what: str, config: SpectralConfig | None = None) -> None:
        """Refuse what projected gradients or drawn columns cannot give.

        Raises:
            RunError: the run was collected with projections, or Grams are of drawn columns.
        """
        if self.config.project is not None:
            raise RunError(
                f"{self.store.path} was collected with --project {self.config.project}: its gradients are random "
                f"projections, and {what} cannot be had from them. Collect another run without --project."
            )
        drawn = (self.config if config is None else SpectralConfig.of(config)).max_params_per_block
        if drawn is not None:
            raise RunError(f"{self.store.path}: max_params_per_block={drawn} draws columns, and {what} takes all.")

    def spectrum(
        self,
        block_structure: str | Mapping[str, str] | None = None,
        center: bool | None = None,
        samples: SampleChoice = None,
        top_k: int | None = None,
        *,
        weights: Sequence[float] | np.ndarray | None = None,
        normalization: Normalization = "samples",
        partial: bool = False,
        bootstrap: int = 0,
        bootstrap_seconds: float | None = None,
        exact: bool = False,
        config: SpectralConfig | None = None,
        progress: bool = False,
        keep: bool | None = None,
    ) -> Spectrum:
        """Solve the run under a block structure.

        What took more than two seconds is kept in the run, where that can be written, and is not solved again; it is
        found by all that it depends on, the Grams' checksums among them.

        Args:
            block_structure: see `block_grams`, as for everything that is not listed here.
            center: the covariance of gradients instead of the Fisher.
            samples: which samples.
            top_k: list the largest `top_k` eigenvalues of each block only (the trace stays exact).
            weights: of the samples.
            normalization: by 'samples' or 'tokens'.
            partial: accept an unfinished run.
            bootstrap: how many subsets to solve for intervals of the metrics, see `analysis.bootstrap`; 0 means none.
            bootstrap_seconds: draw fewer subsets where they would take longer, and none where 8 would.
            exact: refuse where eigenvalues would be estimates.
            config: solver and Gram options.
            progress: show a bar while Grams are built.
            keep: keep what was solved, however long it took, or never; `None`: what took two seconds.

        Raises:
            RunError: `exact` is asked for and the run holds projections, or columns are drawn.
            StreamfisherError: as `block_grams`.
        """
        if exact:
            self.require_exact("an exact spectrum", config)
        found = self.block_grams(
            block_structure,
            center,
            samples,
            weights=weights,
            normalization=normalization,
            partial=partial,
            config=config,
            progress=progress,
        )
        self.store.grams.read_ahead(name for names in found.blocks.values() for name in names)
        spectrum = with_error_bars(self.manifest, self.store, found, found.spectrum(top_k, whole=True, keep=keep))
        if bootstrap:
            drawn = resample(found, spectrum, bootstrap, seed=found.config.seed, seconds=bootstrap_seconds)
            if drawn is not None:
                drawn = dataclasses.replace(drawn, norm_spread=self._norm_spread(found.selection.samples))
            spectrum = dataclasses.replace(spectrum, bootstrap=drawn)
        return spectrum

    def _norm_spread(self, samples: np.ndarray) -> float | None:
        """Return the standard deviation of the logarithm of these samples' gradient norms; `None` where one is zero."""
        squares = self.store.samples.per_sample("squared_norm")[samples].sum(axis=1)
        return float(np.log(squares).std() / 2) if np.isfinite(squares).all() and (squares > 0).all() else None

    def growth(
        self,
        block_structure: str | Mapping[str, str] | None = None,
        center: bool | None = None,
        *,
        sizes: Sequence[int] | None = None,
        seed: int = 42,
        **options: Any,
    ) -> Growth:
        """Return the spectra of nested random subsets of the samples, see `uncertainty.grow`.

        Args:
            block_structure: see `block_grams`.
            center: the covariance of gradients instead of the Fisher.
            sizes: of the subsets; `None` means N, N/2, N/4, ... down to 8.
            seed: of the order in which samples are taken.
            options: of `block_grams`.
        """
        return grow(self.block_grams(block_structure, center, **options), sizes, seed=seed)

    def spectral_density(
        self,
        block: str,
        center: bool | None = None,
        *,
        block_structure: str | Mapping[str, str] | None = None,
        n_vectors: int = 10,
        n_steps: int = 80,
        sigma: float | None = None,
        scale: Scale = "log",
        seed: int | None = None,
        **options: Any,
    ) -> SpectralDensity:
        """Return how many eigenvalues of a block lie where, by stochastic Lanczos quadrature, with the standard error.

        For N whose eigenvalues are too many to solve for; a few dozen passes over the Gram, which may be larger than
        the memory.

        Args:
            block: its key, for example `layer_3`.
            center: of the covariance instead of the Fisher.
            block_structure: see `block_grams`.
            n_vectors: random vectors.
            n_steps: of Lanczos.
            sigma: width of the Gaussians, in decades for `scale='log'`; `None` means 0.1 decades, or 1 %.
            scale: 'log' or 'linear'.
            seed: of the vectors; `None` means the run's.
            options: of `block_grams`: samples, weights, normalization, config.

        Raises:
            StreamfisherError: as `block_grams`, or an option is out of range.
        """
        found = self.block_grams(block_structure, center, **options)
        seed = found.config.seed if seed is None else seed
        return found.density(block, n_vectors=n_vectors, n_steps=n_steps, sigma=sigma, scale=scale, seed=seed)

    def alignment(
        self, block_structure: str | Mapping[str, str] | None = None, center: bool | None = None, **options: Any
    ) -> Alignment:
        """Return the normalised inner products of the blocks' Grams, see `alignment`; options as in `block_grams`."""
        return align(self.block_grams(block_structure, center, **options))

    def grams_of_eigenvectors(
        self, block_structure: str | Mapping[str, str] | None = None, center: bool | None = None, **options: Any
    ) -> BlockGrams:
        """Return the Grams that eigenvectors are made from: exact ones, which the run holds.

        Raises:
            RunError: gradients are projected, columns are drawn, or the stored Grams were made with other settings.
        """
        config = options.get("config") or self.config
        self.require_exact("eigenvectors", config)
        self._require_stored(config)
        return self.block_grams(block_structure, center, **options)

    def eigenvectors(
        self,
        block: str,
        top: int = 20,
        center: bool | None = None,
        *,
        block_structure: str | Mapping[str, str] | None = None,
        overwrite: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> Eigenvectors:
        """Return the leading eigenvectors of a block in parameter space, computed where they are not stored yet.

        Args:
            block: its key, for example `layer_3`.
            top: how many.
            center: of the covariance instead of the Fisher.
            block_structure: see `block_grams`.
            overwrite: replace those that are stored with another `top` or other samples.
            progress: show a bar.
            options: of `block_grams`: samples, weights, normalization.

        Raises:
            StreamfisherError: as `eigenvectors.compute_eigenvectors`.
        """
        found = self.grams_of_eigenvectors(block_structure, center, **options)
        return compute_eigenvectors(self.store, found, block, top, overwrite=overwrite, progress=progress)
