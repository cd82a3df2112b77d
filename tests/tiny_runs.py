"""Stored runs of a few hundred parameters in float64, and their rows as plain arrays, for tests of what comes after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_models

import streamfisher as sf


def make_run(path: Path, n: int = 24, *, seed: int = 0, **options) -> sf.Run:
    """Return a run of a regression of 32 parameters in float64 (4 tensors, blocks `first` and `second` by pattern)."""
    settings = {"chunk_size": 8, "dtype_model": "float64", "dtype_compute": "float64"} | options
    model = tiny_models.TinyRegression(seed).double()
    data = {name: values.double() for name, values in tiny_models.vectors(n).items()}
    return sf.collect(model, data, path, config=sf.SpectralConfig(**settings))


def rows(run: sf.Run, names=None) -> np.ndarray:
    """Return the stored rows of some parameters (all by default), (N, P) float64."""
    names = list(run.parameters) if names is None else names
    return np.concatenate([run.store.rows.columns(name, 0, run.parameters[name]) for name in names], axis=1).astype(
        float
    )


PATTERNS = {"first.*": "first", "second.*": "second"}


def forget_last_unit(run: sf.Run) -> None:
    """Make a finished run one that lacks its last unit and all Grams, as a kill would leave it."""
    run.store.forget_unit(run.store.units[-1])
    for name in run.parameters:
        run.store.grams.forget(name)
