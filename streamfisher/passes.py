"""Passes over the data: every rank claims units that are not done, computes them, writes them, and marks them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from streamfisher.claims import Claims
from streamfisher.config import SpectralConfig
from streamfisher.gradients import GradientEngine
from streamfisher.progress import Progress
from streamfisher.ranks import Ranks
from streamfisher.sharded_guard import SharedGuard
from streamfisher.sharding import idle_batches, is_sharded
from streamfisher.store import RunStore, UnitRecord
from streamfisher.survey import Survey
from streamfisher.unit_rows import gradient_units, idle_passes, squared_norms_of


def row_pass(
    store: RunStore, engine: GradientEngine, found: Survey, config: SpectralConfig, ranks: Ranks, *, progress: bool
) -> None:
    """Write the gradient rows of every unit that has no marker; returns when all ranks are done."""
    together = is_sharded(engine.model)
    claims = Claims(ranks, "gradients", store.todo(), store.units, together=together)
    mean = {name: store.mean(name, 0, columns) for name, columns in store.parameters.items()} if store.centered else {}
    guard = SharedGuard(engine, found, config, claims.units, ranks) if together else None
    with _bar(claims, store, progress) as bar:
        for record in gradient_units(engine, found, claims, config, after_batch=ranks.alive, shared_guard=guard):
            if mean:
                record = _subtract(record, mean)
            rows = {name: values.cpu() for name, values in record.rows.items()}
            store.write_unit(dataclasses.replace(record, rows=rows))
            size = len(record.unit) * sum(store.parameters.values()) * store.store_dtype.itemsize
            bar.done(record.unit, int(record.n_targets.sum()), size)
        if guard is not None:
            idle = idle_batches(claims.units, found.lengths, config.batch_tokens, ranks.index, ranks.count)
            idle_passes(engine, found, config, idle, guard)
        ranks.wait("for the other ranks' gradients")


def mean_pass(
    store: RunStore, engine: GradientEngine, found: Survey, config: SpectralConfig, ranks: Ranks, *, progress: bool
) -> None:
    """Add up the rows of every unit in float64; the mean is their sum over the valid samples."""
    if ranks.share("the mean", (store.path / "done" / "mean.json").is_file()):
        return
    together = is_sharded(engine.model)
    claims = Claims(ranks, "mean", store.todo("mean"), store.units, together=together)
    guard = SharedGuard(engine, found, config, claims.units, ranks) if together else None
    with _bar(claims, store, progress) as bar:
        for record in gradient_units(engine, found, claims, config, after_batch=ranks.alive, shared_guard=guard):
            sums = {name: rows.sum(dim=0, dtype=torch.float64).cpu().numpy() for name, rows in record.rows.items()}
            store.write_mean_part(record.unit, sums, len(record.unit) - len(record.skipped))
            bar.done(record.unit, int(record.n_targets.sum()), 8 * sum(store.parameters.values()))
        if guard is not None:
            idle = idle_batches(claims.units, found.lengths, config.batch_tokens, ranks.index, ranks.count)
            idle_passes(engine, found, config, idle, guard)
        ranks.wait("for the other ranks' part of the mean")
    if ranks.is_main:
        store.finish_mean()
    ranks.wait("for the mean")


def _bar(claims: Claims, store: RunStore, progress: bool) -> Progress:
    todo = sum(len(unit) for unit in claims.units)
    return Progress(claims.ranks, claims.name, todo=todo, total=store.n_samples, shown=progress)


def _subtract(record: UnitRecord, mean: dict[str, np.ndarray | None]) -> UnitRecord:
    """Return the record with the mean gradient subtracted from its valid rows, in float64 before rounding."""
    valid = torch.ones(len(record.unit), dtype=torch.bool)
    valid[[sample - record.unit.start for sample in record.skipped]] = False
    rows = {}
    for name, values in record.rows.items():
        center = torch.from_numpy(np.asarray(mean[name])).to(values.device)
        rows[name] = (values - center * valid.to(values.device)[:, None]).to(values.dtype)
    return dataclasses.replace(record, rows=rows, squared_norms=squared_norms_of(rows))
