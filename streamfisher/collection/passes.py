"""Passes over the data: every rank claims units that are not done, computes them, writes them, and marks them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from streamfisher.collection.claims import Claims, idle_batches
from streamfisher.collection.guard import SharedGuard
from streamfisher.collection.progress import Progress
from streamfisher.collection.survey import Survey
from streamfisher.collection.unit_rows import gradient_units, idle_passes
from streamfisher.config import SpectralConfig
from streamfisher.gradients import GradientEngine
from streamfisher.models.sharding import is_sharded
from streamfisher.runtime.memory import give_back
from streamfisher.runtime.ranks import Ranks
from streamfisher.sinks.centered import _subtract
from streamfisher.sinks.interface import Captured
from streamfisher.store import RunStore, UnitRecord, stage_of


def row_pass(
    store: RunStore,
    engine: GradientEngine,
    found: Survey,
    config: SpectralConfig,
    ranks: Ranks,
    *,
    wave: int = 0,
    progress: bool,
) -> None:
    """Write the gradients of one wave of every unit that has no marker; returns when all ranks are done."""
    name = "gradients" if len(store.waves) == 1 else f"wave {wave + 1} of {len(store.waves)}"
    claims = Claims(ranks, name, store.todo(stage_of(wave)), store.units, together=is_sharded(engine.model))
    captured = wave_capture(store, wave)
    mean = {name: store.mean(name, 0, columns) for name, columns in store.parameters.items()} if store.centered else {}
    with _bar(claims, store, progress) as bar:
        for record in _records(store, engine, found, config, ranks, claims, captured):
            if mean:
                record = _subtract(record, mean)
            rows = {name: values.cpu() for name, values in record.rows.items()}
            store.write_unit(dataclasses.replace(record, rows=rows, wave=wave))
            bar.done(record.unit, int(record.n_targets.sum()), _bytes_of(record, rows, store))
        ranks.wait("for the other ranks' gradients")
    give_back()


def mean_pass(
    store: RunStore, engine: GradientEngine, found: Survey, config: SpectralConfig, ranks: Ranks, *, progress: bool
) -> None:
    """Add up the rows of every unit in float64; the mean is their sum over the valid samples."""
    if ranks.share("the mean", (store.path / "done" / "mean.json").is_file()):
        return
    claims = Claims(ranks, "mean", store.todo("mean"), store.units, together=is_sharded(engine.model))
    captured = Captured(list(store.parameters), columns=store.parameters)
    with _bar(claims, store, progress) as bar:
        for record in _records(store, engine, found, config, ranks, claims, captured):
            sums = {name: rows.sum(dim=0, dtype=torch.float64).cpu().numpy() for name, rows in record.rows.items()}
            store.write_mean_part(record.unit, sums, len(record.unit) - len(record.skipped))
            bar.done(record.unit, int(record.n_targets.sum()), 8 * sum(store.parameters.values()))
        ranks.wait("for the other ranks' part of the mean")
    if ranks.is_main:
        store.finish_mean()
    ranks.wait("for the mean")


def _records(
    store: RunStore,
    engine: GradientEngine,
    found: Survey,
    config: SpectralConfig,
    ranks: Ranks,
    claims: Claims,
    captured: Captured,
) -> Iterator[UnitRecord]:
    """Yield the gradients of the units that this rank claims; with sharded weights, go along with the others' too."""
    names, batch_tokens = captured.names, store.batch_tokens
    guard = SharedGuard(engine, found, config, claims.units, ranks, names, batch_tokens) if claims.together else None
    yield from gradient_units(
        engine,
        found,
        claims,
        config,
        captured=captured,
        batch_tokens=batch_tokens,
        after_batch=ranks.alive,
        shared_guard=guard,
    )
    if guard is not None:
        idle = idle_batches(claims.units, found.lengths, batch_tokens, ranks.index, ranks.count)
        idle_passes(engine, found, config, captured, idle, guard)


def wave_capture(store: RunStore, wave: int) -> Captured:
    """Return what the pass of a wave captures: rows of some parameters, and factors, which go to the store at once."""
    names = store.waves[wave]
    factored = [name for name in names if store.representation(name) == "factors"]
    dense = [name for name in names if store.representation(name) == "dense"]
    return Captured(dense, factored, partial(store.write_factors, wave=wave), store.parameters)


def _bytes_of(record: UnitRecord, rows: dict[str, Tensor], store: RunStore) -> int:
    dense = sum(values.numel() for values in rows.values()) * store.store_dtype.itemsize
    return dense + sum(entry["bytes"] for entry in record.factors)


def _bar(claims: Claims, store: RunStore, progress: bool) -> Progress:
    todo = sum(len(unit) for unit in claims.units)
    return Progress(claims.ranks, claims.name, todo=todo, total=store.n_samples, shown=progress)
