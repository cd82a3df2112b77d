"""What a stored run is asked about other gradients: the influence of its samples on queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from streamfisher.analysis.analyses import Analyses
from streamfisher.analysis.block_grams import BlockGrams, require_memory
from streamfisher.analysis.sample_analyses import SampleAnalyses, check_dampings, structure_of, texts_of
from streamfisher.analysis.tiled_samples import raw_operator, raw_rows
from streamfisher.blocks.structures import unknown_block
from streamfisher.errors import ConfigError, DataError, RunError, RunMismatchError
from streamfisher.influence.damped import MeanProducts, damped_products
from streamfisher.reduction.joined_rows import CrossGram, build_cross_grams
from streamfisher.results.influence import BlockInfluence, Influence
from streamfisher.runtime.determinism import one_thread
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.solving.selection import SampleChoice, select
from streamfisher.solving.solve import add
from streamfisher.store import RunStore
from streamfisher.store.texts import read_texts

#: N x N matrices that a damped inverse takes, beside a stored Gram; where they do not fit, tiles are multiplied.
_MATRICES = 4
#: Gives the products of a run's rows with those of another, for groups of parameters: where they were not kept.
Crossing = Callable[[RunStore, Mapping[str, Sequence[str]]], Mapping[str, CrossGram]]


@dataclass(frozen=True)
class _Products:
    """Products of queries in one block."""

    cross: np.ndarray  # (Q, N) float64, with all samples of the run
    squared_norms: np.ndarray  # (Q,) float64


class InfluenceAnalyses(SampleAnalyses):
    """The part of a run that holds its samples against queries."""

    def influence(
        self,
        queries: Analyses | str | Path | SampleChoice,
        dampings: float | Sequence[float],
        block: str | None = None,
        center: bool | None = None,
        *,
        block_structure: str | Mapping[str, str] | None = None,
        relative: bool = False,
        pseudo_inverse: bool = False,
        query_samples: SampleChoice = None,
        texts: Sequence[str] | None = None,
        crossing: Crossing | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Influence:
        """Return inner products, cosines and damped influence of queries with the samples of this run: exact.

        The influence `g_q^T (F + lambda I)^-1 g_i` is of each block's own Fisher, and their sum is that of the
        block-diagonal one; `block_structure='none'` takes the whole Fisher. See `docs/influence.md` for what it means.

        Args:
            queries: another run of the same model, or its folder, whose rows are multiplied with those of this one;
                or samples of this run (a slice, numbers, a mask), which then do not count as training samples; `None`
                means those that were added as queries.
            dampings: lambda, one or more, in the units of the eigenvalues.
            block: take this block only; 'global' is the whole model.
            center: by the covariance instead of the Fisher; gradients themselves are not centered.
            block_structure: see `block_grams`; `None` means the run's own.
            relative: dampings are multiples of each block's mean eigenvalue, its trace over min(N, P).
            pseudo_inverse: let a damping of 0 leave out what lies below the noise floor.
            query_samples: which samples of another run are queries; `None` means all.
            texts: (N,) what each sample of this run says, to be shown beside its number; `None` means what is stored.
            crossing: gives the products of two runs' rows where they were not kept; `None` reads those that were.
            progress: show bars.
            options: of `block_grams`: samples, weights, normalization, config.

        Raises:
            RunMismatchError: the queries are of another model, or of other parameters.
            RunError: gradients are projected or were deleted, or a run is not fully collected.
            ConfigError: a damping is negative, or 0 where a block is singular; there is no such block.
            DataError: no query or fewer than 2 training samples are left, or there is not one text for each sample.
            CapacityError: a matrix does not fit the memory budget.
        """
        if options.get("partial"):
            raise ConfigError("influence is of finished runs only; leave out partial (--partial).")
        asked = np.atleast_1d(np.asarray(dampings, dtype=np.float64))
        check_dampings(asked.tolist())
        if not len(asked):
            raise ConfigError("influence needs a damping; give at least one.")
        self.require_exact("influence", options.get("config"))
        grams = self._uncentered_grams(structure_of(block or "", block_structure), center, progress=progress, **options)
        keys = list(grams.blocks) if block is None else [block]
        if block is not None and block not in grams.blocks:
            raise unknown_block(block, grams.blocks)
        numbers, of_queries, grams = self._queried(grams, keys, queries, query_samples, kept=crossing is None)
        said = texts_of(self.texts if texts is None else texts, self.n_samples, grams.selection.samples)
        n, n_queries = len(grams.selection), len(numbers)
        results = 8 * n_queries * n * (len(asked) + 1) * (len(keys) + 1)
        work = 8 * 6 * n_queries * n
        if grams.fits(_MATRICES):
            work = 8 * (grams.n_stored**2 + _MATRICES * n**2 + 3 * n_queries * n)
        require_memory(results + work, f"the influence of {n} samples on {n_queries} queries", grams.config)
        parts = {}
        crossed: Mapping[str, CrossGram] = {}
        if crossing is not None and of_queries is not self.store:
            crossed = crossing(of_queries, {key: parameters_of(self.store, grams, key) for key in keys})
        for key in keys:
            products = self._products(grams, key, numbers, of_queries, crossed, progress=progress)
            with one_thread(grams.config.use_deterministic):
                parts[key] = _block_influence(grams, key, products, asked, relative, pseudo_inverse)
        return Influence(
            queries=numbers,
            samples=grams.selection.samples,
            blocks=parts,
            dampings=asked,
            relative=relative,
            fields=_fields(self.store, grams.selection.samples),
            query_fields=_fields(of_queries, numbers),
            texts=said,
            query_texts=self._query_texts(of_queries, numbers, texts),
            centered=grams.center,
            metadata={**grams.metadata, "queries": str(of_queries.path), "query_loss": dict(of_queries.manifest.loss)},
        )

    def _uncentered_grams(
        self, structure: str | Mapping[str, str] | None, center: bool | None, **options: Any
    ) -> BlockGrams:
        """Return Grams of whole gradients, also where rows are stored centered and `center` is asked for."""
        config = options.get("config") or self.config
        center = config.center_gradients if center is None else center
        return dataclasses.replace(self.block_grams(structure, False, **options), center=center)

    def _queried(
        self,
        grams: BlockGrams,
        keys: Sequence[str],
        queries: Analyses | str | Path | SampleChoice,
        query_samples: SampleChoice,
        *,
        kept: bool = True,
    ) -> tuple[np.ndarray, RunStore, BlockGrams]:
        """Return the numbers of the queries, the run that they are in, and the Grams of the training samples."""
        if isinstance(queries, Analyses | str | Path | RemotePath):
            of_queries = queries.store if isinstance(queries, Analyses) else RunStore(queries)
            self._require_same_model(of_queries)
            valid = of_queries.samples.per_sample("valid") == 1
            numbers = select(of_queries.n_samples, valid, query_samples, least=1).samples
            if kept:
                self._require_rows(of_queries, grams, keys)
            return numbers, of_queries, grams
        if query_samples is not None:
            raise ConfigError("query_samples chooses among the samples of another run; `queries` has said which.")
        queries = self.is_query if queries is None and self.is_query.any() else queries
        numbers, grams = _queries_within(grams, self.store.samples.per_sample("valid") == 1, queries)
        return numbers, self.store, grams

    def _query_texts(
        self, of_queries: RunStore, numbers: np.ndarray, texts: Sequence[str] | None
    ) -> tuple[str, ...] | None:
        """Return what the queries say: as it was given with this run's samples, where they are some, or stored."""
        n = of_queries.n_samples
        if texts is not None and of_queries is self.store:
            return texts_of(texts, n, numbers)
        stored = read_texts(of_queries.path, n, of_queries.manifest.config.get("store_text"))
        return texts_of(stored, n, numbers)

    def _require_same_model(self, of_queries: RunStore) -> None:
        """Refuse queries whose gradients are of something else.

        Raises:
            RunMismatchError: the model or its parameters differ; it says which.
            RunError: the queries' gradients are projected, or not all there.
        """
        where = f"the queries in {of_queries.path} cannot be held against {self.store.path}"
        if of_queries.manifest.config.get("project") is not None:
            raise RunError(f"{where}: their gradients are random projections. Collect them without --project.")
        of_queries.markers.require_collected()
        ours, theirs = (
            {item["name"]: str(tuple(item["shape"])) for item in manifest.parameters}
            for manifest in (self.manifest, of_queries.manifest)
        )
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                raise RunMismatchError(
                    f"{where}: the parameter {name} is {theirs.get(name, 'absent')} there and "
                    f"{ours.get(name, 'absent')} here. Collect the queries with the same model and the same --include "
                    "and --exclude."
                )
        for what in ("class", "fingerprint"):
            here, there = self.manifest.model[what], of_queries.manifest.model[what]
            if here != there:
                raise RunMismatchError(
                    f"{where}: the model's {what} is {str(there)[:60]} there and {str(here)[:60]} here. Collect the "
                    "queries with the model that the run was made with."
                )

    def _require_rows(self, of_queries: RunStore, grams: BlockGrams, keys: Sequence[str]) -> None:
        """Refuse runs that keep no gradients, with what can be done.

        Raises:
            RunError: gradients of a block were deleted.
        """
        for key in keys:
            for name in parameters_of(self.store, grams, key):
                for store in (self.store, of_queries):
                    if store.kept.is_deleted(name):
                        raise RunError(
                            f"{store.path} keeps no gradients of {name}, and the products of two runs are made of "
                            "both runs' gradients. Collect it with --keep-gradients all; form its gradients again in "
                            "one more pass, by MODEL and DATA after RUN.zarr (model=, data=; for those of the queries "
                            "--query-data, query_data=); or collect training samples and queries in one run, and "
                            "name the queries by their numbers (--queries 4000:5000)."
                        )

    def _products(
        self,
        grams: BlockGrams,
        key: str,
        numbers: np.ndarray,
        of_queries: RunStore,
        crossed: Mapping[str, CrossGram] = MappingProxyType({}),
        *,
        progress: bool,
    ) -> _Products:
        """Return the products of the queries with all samples of the run in a block."""
        if of_queries is self.store and not grams.fits(_MATRICES):
            cross = raw_rows(grams, key, numbers)
            return _Products(cross, cross[np.arange(len(numbers)), numbers].copy())
        if of_queries is self.store:
            K = add(grams.gram_of(name) for name in grams.blocks[key])
            return _Products(K[numbers], K.diagonal()[numbers].copy())
        found = crossed.get(key)
        if found is None:
            members = {key: parameters_of(self.store, grams, key)}
            found = build_cross_grams(self.store.rows, of_queries.rows, grams.config, members, progress=progress)[key]
        return _Products(found.cross[numbers], found.own.diagonal()[numbers].copy())


def _queries_within(grams: BlockGrams, valid: np.ndarray, queries: SampleChoice) -> tuple[np.ndarray, BlockGrams]:
    """Return the numbers of the samples that are queries, and the Grams of the others.

    Raises:
        DataError: no valid sample is chosen, or fewer than 2 are left.
    """
    if queries is None:
        raise DataError(
            "queries=None takes the samples that were added as queries, and there are none; give another run, or "
            "samples of this one, or add some: run.add(model, samples, role='query')."
        )
    numbers = select(len(valid), valid, queries, least=1).samples
    rest = np.flatnonzero(~np.isin(grams.selection.samples, numbers))
    if len(rest) < 2:
        raise DataError(f"{len(rest)} training samples are left beside {len(numbers)} queries; at least 2 are needed.")
    return numbers, grams.subset(rest)


def parameters_of(store: RunStore, grams: BlockGrams, key: str) -> list[str]:
    """Return the parameters of a block, whatever its Grams sum over."""
    return [name for gram in grams.blocks[key] for name in store.gram_members[gram]]


def _fields(store: RunStore, numbers: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[numbers] for name, values in store.samples.fields().items()}


def _block_influence(
    grams: BlockGrams, key: str, products: _Products, asked: np.ndarray, relative: bool, pseudo_inverse: bool
) -> BlockInfluence:
    """Return the scores of one block: from its matrix in memory, or from products with tiles of it."""
    selection, n = grams.selection, len(grams.selection)
    whole = grams.matrix(key, needs=_MATRICES) if grams.fits(_MATRICES) else None
    if whole is None:
        spectrum, _, tiled = grams.leading_space(key, 1)
    else:
        spectrum = grams.largest(whole)
    dampings = asked
    if relative:
        dampings = asked * spectrum.trace / max(min(n, spectrum.n_params), 1)
    if not dampings.all():
        if whole is None:
            raise ConfigError(
                f"damping=0 takes all eigenvectors of {n} samples, which do not fit the memory budget. Give a damping, "
                "raise --memory-budget, or take fewer samples (--samples)."
            )
        _require_regular(grams, key, whole.K, spectrum.noise_floor, pseudo_inverse)
    raw = raw_operator(grams, key) if whole is None else None
    weights = np.ones(n) if selection.weights is None else selection.weights
    scale = np.sqrt(weights * selection.factor)
    inner = products.cross[:, selection.samples]
    right, mean = inner, None
    if grams.center:
        p = weights / weights.sum()
        of_queries = inner @ p
        right = inner - of_queries[:, None]
        means = whole.raw @ p if whole is not None else raw.matvec(p[:, None])[:, 0] if raw is not None else p
        mean = MeanProducts(scale * (means - p @ means), of_queries)
    K = whole.K if whole is not None else tiled
    damped = damped_products(K, (right * scale).T, scale, dampings, floor=spectrum.noise_floor, mean=mean)
    squared = whole.raw.diagonal().copy() if whole is not None else raw.diagonal() if raw is not None else p
    return BlockInfluence(inner, damped, dampings, products.squared_norms, squared, spectrum.noise_floor)


def _require_regular(grams: BlockGrams, key: str, K: np.ndarray, floor: float, pseudo_inverse: bool) -> None:
    """Refuse to invert a block without damping where it cannot be inverted.

    Raises:
        ConfigError: it is singular, and nobody asked for the pseudo-inverse.
    """
    if pseudo_inverse:
        return
    n_params = sum(grams.parameters[name] for name in grams.blocks[key])
    rank = int((np.linalg.eigvalsh(K) > floor * len(K)).sum())
    if rank < n_params:
        raise ConfigError(
            f"damping=0: the Fisher of {key} has {rank} eigenvalues above its noise floor and {n_params} parameters; "
            "it has no inverse. Give a damping, or ask for the pseudo-inverse (--pseudo-inverse), which leaves out the "
            "directions in which no sample has a gradient."
        )
