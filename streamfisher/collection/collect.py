"""Per-sample gradients of all samples into a run, over as many processes as Accelerate started.

A unit of samples is computed, written, and then marked; after a kill, only units without a marker are computed again.
Units are claimed by whichever rank is free, and what a unit gives depends neither on the rank nor on their number.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from streamfisher.collection.passes import mean_pass, row_pass
from streamfisher.collection.prepare import (
    beside_weights,
    check_streamable,
    choose_way,
    first_samples,
    fixed_way,
    make_engine,
    make_manifest,
    probe_engine,
    stream_engine,
)
from streamfisher.collection.resume import create_or_resume
from streamfisher.collection.streamed import StreamedRun
from streamfisher.collection.survey import Survey, survey
from streamfisher.collection.wave_reduction import is_reduced, reduce_wave, reopen_wave
from streamfisher.config import SpectralConfig
from streamfisher.gradients import GradientEngine, ProbeReport
from streamfisher.gradients.state import without_packing
from streamfisher.models.sharding import is_sharded, reshard
from streamfisher.models.weights import Resident
from streamfisher.planning.run_layout import boundary_room
from streamfisher.runtime.determinism import deterministic
from streamfisher.runtime.memory import local_ranks, of_one_rank
from streamfisher.runtime.ranks import Ranks, start_ranks
from streamfisher.runtime.run_log import RunLog
from streamfisher.runtime.signals import finishing_first
from streamfisher.runtime.threads import chunks_at_a_time
from streamfisher.store import (
    RankLock,
    RunStore,
    stage_of,
)
from streamfisher.stream.engine import StreamEngine


def collect_gradients(
    model: nn.Module,
    samples: Any,
    path: Path,
    *,
    config: SpectralConfig | None = None,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    n_samples: int | None = None,
    description: str | Mapping[str, Any] | None = None,
    progress: bool = False,
    weights: Resident | None = None,
) -> None:
    """Collect a run into the folder `path`: what `streamfisher.collect` does, and says what it takes and raises."""
    stated = config or SpectralConfig()
    config = of_one_rank(stated)
    if config.stream == "layers":
        check_streamable(model, config)
    state = start_ranks(cpu=config.device == "cpu", timeout=config.rank_timeout)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}  # quantised weights keep theirs
    if config.dtype_model is not None and dtypes - {config.dtype_model}:
        model = copy.deepcopy(model).to(config.dtype_model)
    with (
        finishing_first() as stop,
        Ranks(state, timeout=config.rank_timeout, stop=stop) as ranks,
        deterministic(config.use_deterministic, config.seed),
        without_packing(model),  # from the first pass on
        chunks_at_a_time(len(os.sched_getaffinity(0)) // local_ranks()),
    ):
        found = survey(model, samples, config, loss, n_samples)
        reshard(model)
        prepared = None
        streamed = fixed_way(path, model, config, weights) if ranks.is_main else None
        if ranks.is_main and streamed is None:
            prepared = choose_way(path, model, found, config, progress=progress)
            streamed = prepared.streamed
        streamed = ranks.share("whether layers are streamed", streamed)
        make = partial(stream_engine, weights=weights) if streamed else make_engine
        with make(model, found, config) as engine, contextlib.ExitStack() as locks:
            manifest = make_manifest(model, engine, found, stated, description)
            ranks.agree(manifest.facts() | {"folder": str(path.absolute())})
            if ranks.is_main:
                create_or_resume(path, manifest, model, engine, found, config, ranks, locks, progress, prepared)
            elif is_sharded(model) and not ranks.share("whether the run exists"):
                probe_engine(model, engine, found, config.memory_budget)
            ranks.wait("for the run's folder")
            if not ranks.is_main:
                locks.enter_context(RankLock(path))
            store = RunStore(path)
            store.fsync = config.fsync
            facts = {"samples": store.n_samples, "ranks": ranks.count, "waves": len(store.waves)}
            locks.enter_context(RunLog(path, "collect", ranks.index, device=str(state.device), **facts))
            report = ProbeReport.from_dict(store.manifest.probe)
            if streamed:
                engine.apply_routes(report, first_samples(found, model))
            else:
                engine.apply_routes(report)
            if ranks.is_main:
                store.sweep()
                store.write_fields(found.fields)
            if config.store_centered:
                mean_pass(store, engine, found, config, ranks, progress=progress)
            stream = StreamedRun(engine, store, found, ranks, boundary_room(config, path)) if streamed else None
            _waves(store, engine, found, beside_weights(engine, config), ranks, stream, progress=progress)


def _waves(
    store: RunStore,
    engine: GradientEngine | StreamEngine,
    found: Survey,
    config: SpectralConfig,
    ranks: Ranks,
    stream: StreamedRun | None,
    *,
    progress: bool,
) -> None:
    """Collect every wave; where its gradients are not all kept, reduce it before the next one begins."""
    products = SpectralConfig.from_dict(store.manifest.config).gram_options(config)
    for wave in range(len(store.waves)):
        passing = len(store.waves) > 1 or "*" not in store.keep
        whole = passing and is_reduced(store, wave, products) and not store.todo(stage_of(wave))
        reduced = ranks.share(f"whether wave {wave} is reduced", whole)
        if not reduced:
            if ranks.is_main:
                reopen_wave(store, wave, products)
            ranks.wait("for the wave")
            if stream is not None:
                stream.begin(wave)
            row_pass(store, engine, found, config, ranks, wave=wave, progress=progress)
        if passing:
            reduce_wave(store, wave, products, ranks, progress=progress)
        if stream is not None and not reduced:
            stream.finish(wave)
    if stream is not None:
        stream.close()
