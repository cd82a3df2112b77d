"""Per-sample gradients of all samples into a run, over as many processes as Accelerate started.

A unit of samples is computed, written, and then marked; after a kill, only units without a marker are computed again.
Units are claimed by whichever rank is free, and what a unit gives depends neither on the rank nor on their number.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamfisher.planning import run_layout as provisions
from streamfisher.analysis.run import Run
from streamfisher.config import SpectralConfig, dtype_name, format_bytes
from streamfisher.runtime.determinism import deterministic
from streamfisher.errors import RunMismatchError
from streamfisher.gradients import GradientEngine, ProbeReport
from streamfisher.gradients.state import without_packing
from streamfisher.runtime.memory import local_ranks
from streamfisher.collection.prepare import (NewRun, beside_weights, choose_way, fixed_way, lay_out, make_engine, probe_engine, stream_engine)
from streamfisher.collection.passes import mean_pass, row_pass
from streamfisher.planning.run_layout import Provisions, boundary_room, of_one_rank
from streamfisher.runtime.ranks import Ranks, start_ranks
from streamfisher.collection.wave_reduction import is_reduced, reduce_wave, reopen_wave
from streamfisher.runtime.run_log import RunLog
from streamfisher.data.samples import make_units
from streamfisher.models.sharding import is_sharded, reshard
from streamfisher.runtime.signals import finishing_first
from streamfisher.store import (
    Manifest,
    RankLock,
    RunLock,
    RunStore,
    grow_run,
    model_manifest,
    resume_differences,
    stage_of,
    units_left,
    versions,
)
from streamfisher.store.codecs import chunks_at_a_time
from streamfisher.store.layout import chunk_columns
from streamfisher.collection.streamed import StreamedRun, check_streamable, first_samples
from streamfisher.stream.engine import StreamEngine
from streamfisher.models.weights import Resident
from streamfisher.collection.survey import Survey, survey


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
                _create_or_resume(path, manifest, model, engine, found, config, ranks, locks, progress, prepared)
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


def _create_or_resume(
    path: Path,
    manifest: Manifest,
    model: nn.Module,
    engine: GradientEngine | StreamEngine,
    found: Survey,
    config: SpectralConfig,
    ranks: Ranks,
    locks: contextlib.ExitStack,
    progress: bool,
    prepared: NewRun | None,
) -> None:
    """Make the run's folder, or check that what is there is this very run; lock it for all ranks."""
    resuming = (path / "manifest.json").is_file()
    if is_sharded(model):
        ranks.share("whether the run exists", resuming)
    if resuming:
        locks.enter_context(RunLock(path, ranks.processes, on_lost=ranks.fail))
        store = RunStore(path)
        found_differences = resume_differences(store.manifest, manifest, found.samples.digest)
        if found_differences:
            raise RunMismatchError(
                f"{path} cannot be resumed, because it was made otherwise:\n  - "
                + "\n  - ".join(found_differences)
                + "\nUse the same model, data and settings, or another folder."
            )
        if len(store.waves) == 1:
            units = make_units(len(found.samples), config.chunk_size)
            left = units_left(store, len(found.samples)) / max(len(units), 1)
            grams = 8 * len(found.samples) ** 2 * len(store.gram_members)
            provisions.check_disk(path, int(store.bytes_of_rows(len(found.samples)) * left) + grams)
        if len(found.samples) > store.n_samples:
            if progress:
                tqdm.write(f"{path} grows from {store.n_samples} to {len(found.samples)} samples")
            store.fsync = config.fsync
            grow_run(store, manifest)
        return
    new = prepared or lay_out(path, model, engine, found, config)
    if progress:
        tqdm.write(new.report.summary())
    if progress and len(new.provided.waves) > 1:
        tqdm.write(_announced(new.provided))
    path.mkdir(parents=True, exist_ok=True)
    locks.enter_context(RunLock(path, ranks.processes, on_lost=ranks.fail))
    layout = manifest.layout | new.layout()
    RunStore.create(path, dataclasses.replace(manifest, probe=new.report.to_dict(), layout=layout))


def _announced(provided: Provisions) -> str:
    parts = ", ".join(format_bytes(wave.disk) for wave in provided.waves)
    return (
        f"{len(provided.waves)} waves: each is a pass over the data that captures some of the parameters, is reduced "
        f"to its Grams, and deleted before the next. On disk, uncompressed: {parts}"
    )


def make_manifest(
    model: nn.Module,
    engine: GradientEngine | StreamEngine,
    found: Survey,
    config: SpectralConfig,
    description: str | Mapping[str, Any] | None,
    report: ProbeReport | None = None,
) -> Manifest:
    """Return the facts of a run that is about to start; `report` is what the probe found, once it has run."""
    store_dtype = config.dtype_store or engine.row_dtype
    itemsize = torch.finfo(store_dtype).bits // 8
    n = len(found.samples)
    projection = engine.projection if isinstance(engine, GradientEngine) else None
    columns = {} if projection is None else projection.columns
    return Manifest(
        config=config.to_dict(),
        identity=config.identity(),
        model=model_manifest(model),
        parameters=[
            {
                "name": info.name,
                "shape": list(info.shape),
                "dtype": dtype_name(info.dtype),
                **({"columns": columns[info.name]} if info.name in columns else {}),
                "chunk_columns": chunk_columns(columns.get(info.name, info.numel), n, config.chunk_size, itemsize),
            }
            for info in engine.parameters.values()
        ],
        excluded=dict(engine.excluded),
        data=found.data_manifest(config, description),
        loss=found.loss.metadata(),
        layout={
            "chunk_rows": config.chunk_size,
            "dtype_row": dtype_name(engine.row_dtype),
            "dtype_store": dtype_name(store_dtype),
            "bitround": config.bitround,
            "codec": config.codec,
            "centered": config.store_centered,
        },
        probe=report.to_dict() if report else {},
        versions=versions(),
    )
