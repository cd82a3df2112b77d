"""How sure a spectrum is, given N samples: the bootstrap, and growth curves.

A bootstrap resample draws N samples with replacement; sample i comes `m_i` times. Its Fisher is that of the samples
with `m_i > 0` (about 63 %), weighted by `m_i`: a diagonal congruence of a submatrix of the stored Gram. No gradient is
read, and an eigensolve is a quarter of the whole one.

**What the intervals mean.** They are percentile intervals (B. Efron and R. Tibshirani, "An Introduction to the
Bootstrap", 1993, ch. 13) of what another N samples from the same source would give. Sums over samples (trace) and well
separated leading eigenvalues are covered well. A resample has fewer distinct samples than the data, though, so anything
that counts directions (effective and numerical rank, the tail) comes out lower in every resample, and its interval may
exclude the value itself. `bias` (mean of the resamples less the value) shows how much; see R. Beran and M. Srivastava,
"Bootstrap tests and confidence regions for functions of a covariance matrix", Ann. Statist. 13, 1985.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import dask
import numpy as np
import psutil
import threadpoolctl

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.byte_sizes import format_bytes
from streamfisher.errors import CapacityError, ConfigError
from streamfisher.results.bootstrap import BlockBootstrap, Bootstrap, tails
from streamfisher.results.metrics import SCALAR_METRICS, frobenius
from streamfisher.results.spectrum import BlockSpectrum, Spectrum
from streamfisher.runtime.dask_pool import compute_anywhere
from streamfisher.runtime.threads import worker_count
from streamfisher.solving.combine import union
from streamfisher.solving.selection import Selection

#: Metrics that need no eigenvalues: sums over the entries of the Gram.
_WITHOUT_SOLVING = {"trace", "participation_ratio"}
_TASK_RESAMPLES = 16


def bootstrap(
    grams: BlockGrams,
    spectrum: Spectrum,
    n_resamples: int = 1000,
    *,
    seed: int = 42,
    level: float = 0.95,
    metrics: Sequence[str] = SCALAR_METRICS,
) -> Bootstrap:
    """Resample the samples of a spectrum.

    Resample r is drawn by a generator seeded with (seed, r): the same at any number of workers.

    Args:
        grams: what the spectrum was solved from.
        spectrum: of the data itself.
        n_resamples: R.
        seed: of the draws.
        level: of the intervals.
        metrics: which ones; 'trace' and 'participation_ratio' alone need no eigensolve.

    Raises:
        ConfigError: a number is out of range, or a metric is unknown.
        CapacityError: the eigenvalues of all resamples do not fit into half of the free memory.
    """
    if n_resamples < 2:
        raise ConfigError(f"{n_resamples} bootstrap resamples are too few; 1000 is usual, 2 the least.")
    if not 0 < level < 1:
        raise ConfigError(f"the level {level} of an interval must lie between 0 and 1, for example 0.95.")
    unknown = [name for name in metrics if name not in SCALAR_METRICS]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no metric; choose among {', '.join(SCALAR_METRICS)}.")
    solve = not set(metrics) <= _WITHOUT_SOLVING
    counts = {key: len(block.eigenvalues) if solve else 0 for key, block in spectrum.blocks.items()}
    needed = 20 * n_resamples * (sum(counts.values()) + 2 * len(counts))
    if needed > psutil.virtual_memory().available // 2:
        raise CapacityError(
            f"{n_resamples} resamples of {sum(counts.values())} eigenvalues need {format_bytes(needed)}; take fewer "
            "resamples or larger blocks."
        )
    resampled = {
        key: _resample_block(grams, key, counts[key], spectrum.blocks[key].n_params, n_resamples, seed)
        for key in spectrum.blocks
    }
    members = [
        {
            key: _spectrum_of(spectrum.blocks[key], eigenvalues[r], traces[r], norms[r], solve)
            for key, (eigenvalues, traces, norms) in resampled.items()
        }
        for r in range(n_resamples)
    ]
    blocks = {
        key: _summarise(block, [member[key] for member in members], metrics, level)
        for key, block in spectrum.blocks.items()
    }
    unions = [union(member, spectrum.global_.top_k) for member in members]
    of_union = _summarise(spectrum.global_, unions, metrics, level)
    together, whole = spectrum.solved_whole, None
    if together is not None:
        count = len(together.eigenvalues) if solve else 0
        drawn = zip(
            *_resample_block(grams.together(), together.name, count, together.n_params, n_resamples, seed), strict=True
        )
        wholes = [_spectrum_of(together, values, trace, norm, solve) for values, trace, norm in drawn]
        whole = _summarise(together, wholes, metrics, level)
    return Bootstrap(blocks, of_union, n_resamples, seed, level, whole)


def multiplicities(n: int, seed: int, resample: int) -> np.ndarray:
    """Return how often each of n samples is drawn in n draws with replacement: (n,) int64."""
    generator = np.random.Generator(np.random.PCG64([seed, resample]))
    return np.bincount(generator.integers(0, n, n), minlength=n)


def _resample_block(
    grams: BlockGrams, key: str, count: int, n_params: int, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return eigenvalues (R, count), traces (R,) and norms (R,) of one block's resamples."""
    K = grams.rows_gram(key)
    selection = grams.selection
    n = len(K)
    weights = np.ones(n) if selection.weights is None else selection.weights
    # What each draw of a sample adds to Z; with equal weights and 'samples' it is 1.
    shares = selection.added()
    rows = _small_side(K, n_params) if 2 * n_params < n and count else None
    workers = worker_count(grams.config)
    tasks = [
        dask.delayed(_resample, pure=False)(
            K, rows, weights, shares, grams.center, count, seed, range(start, min(start + _TASK_RESAMPLES, n_resamples))
        )
        for start in range(0, n_resamples, _TASK_RESAMPLES)
    ]
    with threadpoolctl.threadpool_limits(1):
        parts = compute_anywhere(tasks, workers)
    eigenvalues, traces, norms = (np.concatenate(column) for column in zip(*parts, strict=True))
    return eigenvalues, traces, norms


def _small_side(K: np.ndarray, n_params: int) -> np.ndarray:
    """Return rows of at most `n_params` columns that have the Gram `K`: the block in coordinates of its row space."""
    values, vectors = np.linalg.eigh(K)
    return vectors[:, -n_params:] * np.sqrt(np.maximum(values[-n_params:], 0.0))


def _resample(
    K: np.ndarray,
    rows: np.ndarray | None,
    weights: np.ndarray,
    shares: np.ndarray,
    center: bool,
    count: int,
    seed: int,
    resamples: range,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solve some resamples; of the two sides of a block the smaller one."""
    eigenvalues, traces, norms = np.zeros((len(resamples), count)), np.empty(len(resamples)), np.empty(len(resamples))
    for place, r in enumerate(resamples):
        drawn = multiplicities(len(K), seed, r)
        distinct = np.flatnonzero(drawn)
        of_drawn = weights[distinct] * drawn[distinct]
        chosen = Selection(distinct, of_drawn, float(shares @ drawn))
        if rows is not None:
            part = rows[distinct]
            if center:
                part = part - (of_drawn @ part) / of_drawn.sum()
            part = part * np.sqrt(of_drawn / chosen.denominator)[:, None]
            F = part.T @ part
        else:
            sub = chosen.restrict(K)
            F = chosen.scale(chosen.center(sub) if center else sub) / len(chosen)
        traces[place], norms[place] = np.trace(F), frobenius(F)
        if count:
            values = np.maximum(np.linalg.eigvalsh(F)[::-1][:count], 0.0)
            eigenvalues[place, : len(values)] = values
    return eigenvalues, traces, norms


def _spectrum_of(block: BlockSpectrum, values: np.ndarray, trace: float, norm: float, solved: bool) -> BlockSpectrum:
    """Return a resample as a spectrum like that of the data, with the same noise floor."""
    above = values > block.noise_floor if solved else np.ones(0, dtype=bool)
    return dataclasses.replace(block, eigenvalues=values, above_floor=above, trace=float(trace), norm=float(norm))


def _summarise(
    block: BlockSpectrum, resamples: Sequence[BlockSpectrum], metrics: Sequence[str], level: float
) -> BlockBootstrap:
    observed = block.metrics
    if len(resamples[0].eigenvalues):
        rows = [resample.metrics for resample in resamples]
        low, high = np.quantile(np.stack([r.eigenvalues for r in resamples]), tails(level), axis=0)
    else:  # nothing was solved
        rows = [
            {"trace": r.trace, "participation_ratio": (r.trace / r.norm) ** 2 if r.norm else 0.0} for r in resamples
        ]
        low = high = np.zeros(0)
    values = {
        name: np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)
        for name in metrics
    }
    return BlockBootstrap(block.name, values, {name: observed[name] for name in metrics}, low, high, level)
