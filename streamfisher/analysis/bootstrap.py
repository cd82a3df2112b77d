"""How sure a spectrum is, given N samples: the metrics of random subsets that lack an eighth of them.

A subset's Fisher is that of a submatrix of the stored Gram: no gradient is read, and an eigensolve is two thirds of the
whole one. The standard error of a metric at N samples is its standard deviation over subsets of `N - d`, times
`sqrt((N - d) / d)`: the delete-d jackknife (J. Shao and C. F. J. Wu, "A general theory for jackknife variance
estimation", Ann. Statist. 17, 1989), taken of the logarithm, because ranks and eigenvalues scale with N.

**Why not with replacement.** Such a resample has 63 % of the distinct samples, so whatever counts directions comes out
lower in every one, and a percentile interval excludes the value that it is of. Subsets have no duplicates, and an
interval about the value itself contains it. The jackknife's variance is too large rather than too small, for any
symmetric function of independent samples (B. Efron and C. Stein, "The jackknife estimate of variance", Ann. Statist. 9,
1981). What was seen is in `docs/metrics.md`.

**What the intervals are of**: the value that N samples from this source give on average. For a trace that is the true
one; ranks and tails move with N, which growth curves show.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence

import dask
import numpy as np
import psutil
import threadpoolctl

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.byte_sizes import format_bytes
from streamfisher.errors import CapacityError, ConfigError
from streamfisher.results.bootstrap import BlockBootstrap, Bootstrap, quantile
from streamfisher.results.metrics import SCALAR_METRICS, frobenius
from streamfisher.results.spectrum import BlockSpectrum, Spectrum
from streamfisher.runtime.dask_pool import compute_anywhere
from streamfisher.runtime.stage_progress import steps
from streamfisher.runtime.threads import worker_count
from streamfisher.solving.combine import union
from streamfisher.solving.selection import Selection

#: Metrics that need no eigenvalues: sums over the entries of the Gram.
_WITHOUT_SOLVING = {"trace", "participation_ratio"}
_TASK_RESAMPLES = 16
_LEAST_RESAMPLES = 8  # of an interval in a budget


def bootstrap(
    grams: BlockGrams,
    spectrum: Spectrum,
    n_resamples: int = 1000,
    *,
    seed: int = 42,
    level: float = 0.95,
    metrics: Sequence[str] = SCALAR_METRICS,
    seconds: float | None = None,
) -> Bootstrap | None:
    """Solve random subsets of the samples of a spectrum.

    Subset r is drawn by a generator seeded with (seed, r): the same at any number of workers.

    Args:
        grams: what the spectrum was solved from.
        spectrum: of the data itself.
        n_resamples: R subsets; the standard error is known to one part in sqrt(2 R).
        seed: of the draws.
        level: of the intervals.
        metrics: which ones; 'trace' and 'participation_ratio' alone need no eigensolve.
        seconds: solve fewer subsets where all would take longer, by the time that the first one takes.

    Returns:
        `None` where fewer than 8 subsets can be solved in `seconds`.

    Raises:
        ConfigError: a number is out of range, or a metric is unknown.
        CapacityError: the eigenvalues of all resamples do not fit into half of the free memory.
    """
    if n_resamples < 2:
        raise ConfigError(f"{n_resamples} subsets are too few for intervals; 100 is usual, 2 the least.")
    if not 0 < level < 1:
        raise ConfigError(f"the level {level} of an interval must lie between 0 and 1, for example 0.95.")
    unknown = [name for name in metrics if name not in SCALAR_METRICS]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no metric; choose among {', '.join(SCALAR_METRICS)}.")
    solve = not set(metrics) <= _WITHOUT_SOLVING
    counts = {key: len(block.eigenvalues) if solve else 0 for key, block in spectrum.blocks.items()}
    if seconds is not None:
        n_resamples = min(n_resamples, _affordable(grams, spectrum, counts, seconds, seed))
        if n_resamples < _LEAST_RESAMPLES:
            return None
    needed = 20 * n_resamples * (sum(counts.values()) + 2 * len(counts))
    if needed > psutil.virtual_memory().available // 2:
        raise CapacityError(
            f"{n_resamples} resamples of {sum(counts.values())} eigenvalues need {format_bytes(needed)}; take fewer "
            "resamples or larger blocks."
        )
    n, n_inputs = len(grams.selection), len(np.unique(grams.selection.inputs))
    resampled = {
        key: _resample_block(grams, key, counts[key], spectrum.blocks[key].n_params, n_resamples, seed)
        for key in steps(list(spectrum.blocks), "intervals of blocks", show=grams.progress, n_samples=n)
    }
    members = [
        {
            key: _spectrum_of(spectrum.blocks[key], eigenvalues[r], traces[r], norms[r], solve)
            for key, (eigenvalues, traces, norms) in resampled.items()
        }
        for r in range(n_resamples)
    ]
    blocks = {
        key: _summarise(block, [member[key] for member in members], metrics, level, n_inputs)
        for key, block in spectrum.blocks.items()
    }
    unions = [union(member, spectrum.global_.top_k) for member in members]
    of_union = _summarise(spectrum.global_, unions, metrics, level, n_inputs)
    together, whole = spectrum.solved_whole, None
    if together is not None:
        count = len(together.eigenvalues) if solve else 0
        drawn = zip(
            *_resample_block(grams.together(), together.name, count, together.n_params, n_resamples, seed), strict=True
        )
        wholes = [_spectrum_of(together, values, trace, norm, solve) for values, trace, norm in drawn]
        whole = _summarise(together, wholes, metrics, level, n_inputs)
    return Bootstrap(blocks, of_union, n_resamples, seed, level, whole, n_left_out=left_out(n_inputs))


def left_out(n: int) -> int:
    """Return d: an eighth of n samples, 1 at least."""
    return max(1, n // 8)


def subset(n: int, seed: int, resample: int) -> np.ndarray:
    """Return which of n samples are in a subset: (n - d,) int64, ascending."""
    generator = np.random.Generator(np.random.PCG64([seed, resample]))
    return np.sort(generator.permutation(n)[left_out(n) :])


def subset_of_inputs(inputs: np.ndarray, seed: int, resample: int) -> np.ndarray:
    """Return which samples are in a subset: all those of an input or none, as they are not independent.

    Args:
        inputs: (n,) which input each sample is of.
        seed: of the draws.
        resample: which one.
    """
    numbers, of = np.unique(inputs, return_inverse=True)
    drawn = np.zeros(len(numbers), dtype=bool)
    drawn[subset(len(numbers), seed, resample)] = True
    return np.flatnonzero(drawn[of])


def _affordable(grams: BlockGrams, spectrum: Spectrum, counts: Mapping[str, int], seconds: float, seed: int) -> int:
    """Return how many subsets of all blocks can be solved in so many seconds, by the time of one of the first block."""
    key = next(iter(spectrum.blocks))
    begun = time.monotonic()
    K = grams.rows_gram(key)
    read = time.monotonic() - begun
    ones = np.ones(len(K))
    begun = time.monotonic()
    with threadpoolctl.threadpool_limits(1):
        _resample(K, None, ones, ones, grams.selection.inputs, grams.center, counts[key], seed, range(1))
    one = max(time.monotonic() - begun, 1e-6)
    blocks = len(spectrum.blocks) + (spectrum.solved_whole is not None)
    return int((seconds - blocks * read) * worker_count(grams.config) / (one * blocks))


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
            K,
            rows,
            weights,
            shares,
            selection.inputs,
            grams.center,
            count,
            seed,
            range(start, min(start + _TASK_RESAMPLES, n_resamples)),
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
    inputs: np.ndarray,
    center: bool,
    count: int,
    seed: int,
    resamples: range,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solve some resamples; of the two sides of a block the smaller one."""
    eigenvalues, traces, norms = np.zeros((len(resamples), count)), np.empty(len(resamples)), np.empty(len(resamples))
    for place, r in enumerate(resamples):
        kept = subset_of_inputs(inputs, seed, r)
        of_drawn = weights[kept]
        chosen = Selection(kept, of_drawn, float(shares[kept].sum()))
        if rows is not None:
            part = rows[kept]
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
    block: BlockSpectrum, resamples: Sequence[BlockSpectrum], metrics: Sequence[str], level: float, n_inputs: int
) -> BlockBootstrap:
    observed, n = block.metrics, block.n_samples
    inflation = math.sqrt((n_inputs - left_out(n_inputs)) / left_out(n_inputs))
    if len(resamples[0].eigenvalues):
        rows = [resample.metrics for resample in resamples]
        low, high = _bands(block.eigenvalues, np.stack([r.eigenvalues for r in resamples]), level, inflation)
    else:  # nothing was solved
        rows = [
            {"trace": r.trace, "participation_ratio": (r.trace / r.norm) ** 2 if r.norm else 0.0} for r in resamples
        ]
        low = high = np.zeros(0)
    values = {
        name: np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)
        for name in metrics
    }
    observed = {name: observed[name] for name in metrics}
    return BlockBootstrap(block.name, values, observed, low, high, level, inflation, n)


def _bands(values: np.ndarray, found: np.ndarray, level: float, inflation: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval of each eigenvalue, (r,) and (r,); zero where a subset has none of this rank.

    Args:
        values: (r,) of the data.
        found: (R, r) of the subsets.
        level: of the intervals.
        inflation: of their standard deviations.
    """
    known = (found > 0).all(axis=0) & (values > 0)
    width = np.zeros(len(values))
    spread = np.log(found[:, known]).std(axis=0, ddof=1)
    width[known] = np.minimum(quantile(level, len(found) - 1) * inflation * spread, 700.0)
    return np.where(known, values * np.exp(-width), 0.0), np.where(known, values * np.exp(width), 0.0)
