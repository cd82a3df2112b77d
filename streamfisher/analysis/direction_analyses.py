"""What a stored run is asked about directions: the share of a mean, an update or a query in leading eigenspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.analysis.analyses import Analyses
from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.eigenvectors import slabs
from streamfisher.analysis.influence_analyses import InfluenceAnalyses, parameters_of
from streamfisher.analysis.sample_analyses import structure_of
from streamfisher.blocks.structures import unknown_block
from streamfisher.errors import ConfigError, DataError, RunError
from streamfisher.influence.directions import Directions, joined, mean_direction, resampled_shares, shares_of
from streamfisher.results.directions import BlockDirections, DirectionAnalysis
from streamfisher.results.spectrum import BlockSpectrum
from streamfisher.runtime.determinism import one_thread
from streamfisher.solving.selection import SampleChoice


class DirectionAnalyses(InfluenceAnalyses):
    """The part of a run that holds directions against its eigenspaces."""

    def directions(
        self,
        top: int = 10,
        block: str | None = None,
        center: bool | None = None,
        *,
        block_structure: str | Mapping[str, str] | None = None,
        update: Mapping[str, Any] | str | Path | None = None,
        queries: Analyses | str | Path | SampleChoice = None,
        query_samples: SampleChoice = None,
        bootstrap: int = 0,
        progress: bool = False,
        **options: Any,
    ) -> DirectionAnalysis:
        """Return how much of the mean gradient, of an update and of queries' gradients lies in leading eigenspaces.

        Block by block: the share of a direction's squared norm in the `top` leading eigenvectors. The mean gradient is
        that of the selected samples, as they are weighted; it needs Grams only, an update and queries of another run
        need stored gradients.

        Args:
            top: k; fewer where fewer eigenvalues lie above the noise floor.
            block: take this block only; 'global' is the whole model.
            center: eigenvectors of the covariance instead of the Fisher.
            block_structure: see `block_grams`; `None` means the run's own.
            update: a difference of weights, as two checkpoints' or an optimiser's step: parameter -> array or tensor of
                its shape, or a .safetensors file of those. What is not a parameter of the run is left out, and named.
            queries: another run of the same model, or samples of this one; see `influence`. Those of this run do not
                count in the Fisher.
            query_samples: which samples of another run are queries; `None` means all.
            bootstrap: resamples of the samples for a standard error of the shares; 0 means none.
            progress: show bars.
            options: of `block_grams`: samples, weights, normalization, config.

        Raises:
            DataError: the update lacks a parameter of a block, or has one of another shape or with values that are not
                finite.
            RunError: gradients that are needed were deleted, or are projected.
            ConfigError: an option is out of range; there is no such block.
            StreamfisherError: as `influence`.
        """
        if top < 1:
            raise ConfigError(f"top={top}: ask for at least 1 eigenvector.")
        if bootstrap < 0 or bootstrap == 1:
            raise ConfigError(f"bootstrap={bootstrap}: a standard error needs at least 2 resamples; 0 means none.")
        if options.get("partial"):
            raise ConfigError("shares of directions are of finished runs only; leave out partial (--partial).")
        self.require_exact("the share of a direction", options.get("config"))
        grams = self._uncentered_grams(structure_of(block or "", block_structure), center, progress=progress, **options)
        if block is not None and block not in grams.blocks:
            raise unknown_block(block, grams.blocks)
        keys = list(grams.blocks) if block is None else [block]
        names, facts = ["mean gradient"], dict(grams.metadata)
        step: dict[str, np.ndarray] | None = None
        if update is not None:
            step, left_out = self._step(
                update, [name for key in keys for name in parameters_of(self.store, grams, key)]
            )
            names.append("update")
            facts |= {"update_left_out": left_out}
        numbers, of_queries = np.zeros(0, dtype=np.int64), self.store
        if queries is not None:
            numbers, of_queries, grams = self._queried(grams, keys, queries, query_samples)
            names += [f"query {number}" for number in numbers.tolist()]
            facts |= {"queries": str(of_queries.path)}
        found = {}
        for key in keys:
            parts = [] if step is None else [self._of_step(grams, key, step)]
            if len(numbers):
                products = self._products(grams, key, numbers, of_queries, progress=progress)
                parts.append(Directions(products.cross[:, grams.selection.samples].T, products.squared_norms))
            with one_thread(grams.config.use_deterministic):
                found[key] = _block_directions(grams, key, parts, top, bootstrap)
        return DirectionAnalysis(tuple(names), found, grams.center, bootstrap, facts)

    def _step(
        self, update: Mapping[str, Any] | str | Path, needed: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return an update as flat float64 arrays of the parameters that are needed, and what else it has.

        Raises:
            DataError: it cannot be read, lacks a parameter, or has one of another shape or that is not finite.
        """
        if isinstance(update, str | Path):
            update = _read_update(Path(update))
        shapes = {item["name"]: tuple(item["shape"]) for item in self.manifest.parameters}
        step = {}
        for name in needed:
            if name not in update:
                raise DataError(f"the update has no parameter {name!r}; it has {', '.join(list(update)[:5])}, ...")
            value = update[name]
            detached = value.detach().cpu().double().numpy() if hasattr(value, "detach") else value
            array = np.asarray(detached, dtype=np.float64)
            if array.shape != shapes[name]:
                raise DataError(f"the update of {name} has the shape {array.shape}, and the parameter {shapes[name]}.")
            if not np.isfinite(array).all():
                raise DataError(f"the update of {name} is not finite.")
            step[name] = array.reshape(-1)
        return step, [name for name in update if name not in shapes]

    def _of_step(self, grams: BlockGrams, key: str, step: Mapping[str, np.ndarray]) -> Directions:
        """Return the part of an update in a block, by one pass over the block's stored gradients."""
        products, squared = np.zeros(self.n_samples), 0.0
        for name in parameters_of(self.store, grams, key):
            if self.store.kept.is_deleted(name):
                raise RunError(
                    f"{self.store.path} keeps no gradients of {name}, and an update is multiplied with them. Collect "
                    "it with --keep-gradients all, or with a pattern that matches the block."
                )
            squared += float(step[name] @ step[name])
            for start, stop, rows in slabs(self.store, name):
                products += rows @ step[name][start:stop]
        return Directions(products[grams.selection.samples][:, None], np.array([squared]))


def _read_update(path: Path) -> Mapping[str, Any]:
    if path.suffix != ".safetensors" or not path.is_file():
        raise DataError(f"the update {path} must be a .safetensors file that exists: one tensor for each parameter.")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"the update {path} cannot be read as safetensors: {error}") from error


def _block_directions(
    grams: BlockGrams, key: str, parts: list[Directions], top: int, bootstrap: int
) -> BlockDirections:
    """Return the shares of the mean gradient and of other directions in one block."""
    selection, n = grams.selection, len(grams.selection)
    space = grams.sample_space(key)
    raw = space.raw
    weights = np.ones(n) if selection.weights is None else selection.weights
    every = joined([mean_direction(raw, weights), *parts])
    k = min(top, int(space.spectrum.above_floor.sum()))
    values = space.spectrum.eigenvalues
    scale = np.sqrt(weights * selection.factor)
    shares = shares_of(space.vectors[:, :k], n * values[:k], every, scale, weights if grams.center else None)
    errors = None
    if bootstrap and k:
        resamples = resampled_shares(
            raw,
            joined(parts) if parts else Directions(np.zeros((n, 0)), np.zeros(0)),
            weights,
            k,
            center=grams.center,
            of_mean=True,
            n_resamples=bootstrap,
            seed=grams.config.seed,
        )
        errors = resamples.std(axis=0, ddof=1)
    rounding = _rounding(space.spectrum, shares, k)
    return BlockDirections(values[:k], shares, every.squared_norms, rounding, errors, space.spectrum.n_params)


def _rounding(spectrum: BlockSpectrum, shares: np.ndarray, k: int) -> np.ndarray:
    """Return an estimate of what rounding does to the share in k eigenvectors, (m,): by their sizes, and by a turn.

    A perturbation E turns the space of the k leading eigenvectors by at most |E| / (lambda_k - lambda_(k+1)) (Davis and
    Kahan), and a share by at most twice that.
    """
    if not k:
        return np.zeros(len(shares))
    values, errors = spectrum.eigenvalues, spectrum.relative_errors[:k]
    gap = values[k - 1] - (values[k] if k < len(values) else 0.0)
    turn = 2 * float((errors * values[:k]).max()) / gap if gap > 0 else 1.0
    return np.minimum(shares @ errors + min(turn, 1.0), 1.0)
