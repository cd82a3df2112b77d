"""How far the spectrum of a projected run may be from the exact one, metric by metric.

A projected squared norm has relative variance at most v_p, see `ProjectedShape.relative_variance`, and parameters are
projected independently of one another. So a block's trace `sum_p tr_p` has relative standard deviation at most

    t = sqrt(sum_p tr_p^2 v_p) / sum_p tr_p

and a quadratic form `u^T K u` with a fixed u at most `e = sqrt(max_p v_p)`. An eigenvalue is not at a fixed u: to
second order its neighbours move it by `v / 2 sum_j lambda_j / (lambda - lambda_j)`, for a large lambda about
`b = v / 2 (tr / lambda - 1)`, and its error is taken as `sqrt(e^2 + b^2)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.gradients.projection import projected_shape
from streamfisher.results.metrics import SCALAR_METRICS
from streamfisher.results.spectrum import BlockSpectrum, Spectrum
from streamfisher.store import Manifest, RunStore


def relative_variances(manifest: Manifest) -> dict[str, float]:
    """Return v_p of each parameter of a projected run; 0 where it is not projected."""
    shapes = {item["name"]: projected_shape(item["shape"], manifest.config["project"]) for item in manifest.parameters}
    return {name: 0.0 if shape is None else shape.relative_variance for name, shape in shapes.items()}


def with_error_bars(manifest: Manifest, store: RunStore, grams: BlockGrams, spectrum: Spectrum) -> Spectrum:
    """Return the spectrum of a projected run with the relative error of each metric; that of an exact run as it is."""
    if manifest.config.get("project") is None:
        return spectrum
    variances = relative_variances(manifest)
    traces = None if grams.center or store.centered else _traces(store, grams)
    members = {
        key: [name for gram in names for name in store.gram_members[gram]] for key, names in grams.blocks.items()
    }
    blocks = {
        key: dataclasses.replace(block, error_bars=error_bars(block, members[key], variances, traces))
        for key, block in spectrum.blocks.items()
    }
    everything = [name for names in members.values() for name in names]
    of_whole = error_bars(spectrum.global_, everything, variances, traces)
    union = dataclasses.replace(spectrum.global_, error_bars=of_whole)
    whole = spectrum.solved_whole
    if whole is not None:
        whole = dataclasses.replace(whole, error_bars=error_bars(whole, everything, variances, traces))
    projection = spectrum.metadata["projection"] | {"relative_std": of_whole["trace"]}
    metadata = spectrum.metadata | {"projection": projection}
    return dataclasses.replace(spectrum, blocks=blocks, global_=union, metadata=metadata, solved_whole=whole)


def error_bars(
    block: BlockSpectrum, names: list[str], variances: Mapping[str, float], traces: Mapping[str, float] | None
) -> dict[str, float | None]:
    """Return `{metric: relative error}` of a block; `None` for what hangs on small eigenvalues, which have no bound.

    Args:
        block: solved from projected rows.
        names: its parameters.
        variances: v_p of each.
        traces: tr_p of each; `None`: not known, and the largest v_p is taken for all.
    """
    found: dict[str, float | None] = dict.fromkeys(SCALAR_METRICS)
    v = max(variances[name] for name in names)
    if v == 0.0:
        return dict.fromkeys(SCALAR_METRICS, 0.0)
    e = math.sqrt(v)
    t = e
    if traces is not None and (total := sum(traces[name] for name in names)) > 0:
        t = math.sqrt(sum(traces[name] ** 2 * variances[name] for name in names)) / total
    found["trace"] = t
    values = [float(value) for value in block.eigenvalues[:2]]
    errors = [math.hypot(e, v / 2 * (block.trace / value - 1.0)) if value > 0 else None for value in values]
    for metric, error in zip(("largest_eigenvalue", "second_eigenvalue"), errors, strict=False):
        found[metric] = error
    if values and errors[0] is not None:
        found["stable_rank"] = found["cumulative_variance_1"] = t + errors[0]
        metrics = block.metrics
        if metrics["participation_ratio"]:  # |K|_F^2 grows by at most v tr^2 on average
            found["participation_ratio"] = 2.0 * (t + e) + v * metrics["participation_ratio"]
        if len(values) > 1 and errors[1] is not None and values[0] > values[1]:
            moved = errors[0] * values[0] + errors[1] * values[1]
            found["spectral_gap"] = moved / (values[0] - values[1])
    return found


def _traces(store: RunStore, grams: BlockGrams) -> dict[str, float]:
    """Return the trace of each parameter's projected rows over the selected samples, up to a common factor."""
    squares = store.samples.per_sample("squared_norm")[grams.selection.samples]
    weights = grams.selection.weights
    sums = squares.sum(axis=0) if weights is None else np.asarray(weights) @ squares
    return dict(zip(store.parameters, sums.tolist(), strict=True))
