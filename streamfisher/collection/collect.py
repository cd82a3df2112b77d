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

from streamfisher.analysis.run import Run
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


def collect(
    model: nn.Module,
    samples: Any,
    path: str | Path,
    *,
    config: SpectralConfig | None = None,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    n_samples: int | None = None,
    description: str | Mapping[str, Any] | None = None,
    progress: bool = False,
    weights: Resident | None = None,
) -> Run:
    """Write the gradient of every sample with respect to every selected parameter; resume where a run was stopped.

    The model is used in `eval()` (dropout off, BatchNorm with its running statistics) and handed back as it came.

    Args:
        model: on the device where it is to run.
        samples: a map-style dataset of dicts of tensors without batch axis, or one dict of batched tensors.
        path: the run's folder; it is made, resumed if it is a run of the same model, samples and settings, or grown if
            its samples are the first of these.
        config: `None` means the defaults.
        loss: `(model, batch) -> (B,)` per-sample losses; `None` means chosen from the model's output and labels.
        n_samples: how many samples to use, from the first; `None` means all.
        description: what the samples are, in words or as options, for the manifest.
        progress: show bars.
        weights: what `load_skeleton` returned beside the model, where weights are read layer by layer.

    Returns:
        The open run, complete.

    Raises:
        DataError: fewer than 2 samples, or one that cannot be used.
        ModelError: nothing to differentiate.
        LossError: no loss fits.
        CaptureError: gradients that disagree with plain autograd on every path.
        NonFiniteError: a loss or gradient is not finite and `on_nonfinite='raise'`.
        RunMismatchError: the folder holds a run of another model, other samples or other settings.
        RunError: the folder is not a run, or another process writes it.
        RankError: another rank failed, died, or was given other work.
        StoppedError: SIGTERM or SIGUSR1 came; the units in flight are finished and marked.
        CapacityError: there is no room on the disk, or no memory for one chunk of rows.
    """
    stated = config or SpectralConfig()
    config = of_one_rank(stated)
    if config.stream == "layers":
        check_streamable(model, config)
    path = Path(path)
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
    return Run(path)


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
