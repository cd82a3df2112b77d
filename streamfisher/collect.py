"""Per-sample gradients of all samples into a run, over as many processes as Accelerate started.

A unit of samples is computed, written, and then marked; after a kill, only units without a marker are computed again.
Nothing depends on the number of processes: rank r of R takes the units `todo[r::R]`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from streamfisher import planner
from streamfisher.analysis import Run
from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.determinism import deterministic
from streamfisher.errors import NonFiniteError, RunMismatchError
from streamfisher.gradients import GradientEngine, ProbeReport
from streamfisher.losses import draw_labels, sample_seed
from streamfisher.samples import Unit, collate, make_batches
from streamfisher.store import Manifest, RunLock, RunStore, UnitRecord, differences, model_manifest, versions
from streamfisher.store.layout import check_free, chunk_columns
from streamfisher.survey import Survey, probe_batch, survey, to_model


def collect(
    model: nn.Module,
    samples: Any,
    path: str | Path,
    *,
    config: SpectralConfig | None = None,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    n_samples: int | None = None,
    description: str | None = None,
    progress: bool = False,
) -> Run:
    """Write the gradient of every sample with respect to every selected parameter; resume where a run was stopped.

    The model is used in `eval()` (dropout off, BatchNorm with its running statistics) and handed back as it came.

    Args:
        model: on the device where it is to run.
        samples: a map-style dataset of dicts of tensors without batch axis, or one dict of batched tensors.
        path: the run's folder; it is made, or resumed if it is a run of the same model, samples and settings.
        config: `None` means the defaults.
        loss: `(model, batch) -> (B,)` per-sample losses; `None` means chosen from the model's output and labels.
        n_samples: how many samples to use, from the first; `None` means all.
        description: what the samples are, for the manifest.
        progress: show bars.

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
        CapacityError: there is no room on the disk, or no memory for one chunk of rows.
    """
    config = config or SpectralConfig()
    path = Path(path)
    state = PartialState(cpu=not torch.cuda.is_available() or config.device == "cpu")
    if config.dtype_model is not None and any(p.dtype != config.dtype_model for p in model.parameters()):
        model = copy.deepcopy(model).to(config.dtype_model)
    with deterministic(config.use_deterministic, config.seed):
        found = survey(model, samples, config, loss, n_samples)
        with make_engine(model, found, config) as engine:
            if state.is_main_process:
                _create_or_resume(path, model, engine, found, config, description, progress)
            state.wait_for_everyone()
            store = RunStore(path)
            engine.apply_routes(ProbeReport.from_dict(store.manifest.probe))
            with _lock(path, state):
                if state.is_main_process:
                    store.sweep()
                if config.store_centered:
                    _mean_pass(store, engine, found, config, state, progress)
                _row_pass(store, engine, found, config, state, progress)
    state.wait_for_everyone()
    return Run(path)


def make_engine(model: nn.Module, found: Survey, config: SpectralConfig) -> GradientEngine:
    """Return the gradient engine that `config` asks for; a context manager."""
    return GradientEngine(
        model,
        found.loss,
        include=config.include,
        exclude=config.exclude,
        dtype_compute=config.dtype_compute,
        deterministic=config.use_deterministic,
    )


def gradient_units(
    engine: GradientEngine, found: Survey, units: Sequence[Unit], config: SpectralConfig
) -> Iterator[UnitRecord]:
    """Yield the gradients of each unit. The rows are views of one buffer that the next unit overwrites.

    Raises:
        NonFiniteError: a loss or gradient is not finite and `config.on_nonfinite == 'raise'`; names the sample.
    """
    if not units:
        return
    buffer = engine.allocate(max(len(unit) for unit in units))
    for unit in units:
        numbers = range(unit.start, unit.stop)
        losses, targets = np.empty(len(unit)), np.empty(len(unit), dtype=np.int64)
        for batch_range in make_batches([found.lengths[number] for number in numbers], config.batch_tokens):
            where = slice(batch_range.start, batch_range.stop)
            batch = to_model(collate([found.samples[unit.start + offset] for offset in batch_range]), engine.model)
            if config.labels == "model":
                seeds = [sample_seed(config.seed, unit.start + offset) for offset in batch_range]
                batch = draw_labels(engine.model, batch, found.loss, seeds)
            result = engine.rows(batch, {name: rows[where] for name, rows in buffer.items()})
            losses[where], targets[where] = result.losses.numpy(), result.n_targets.numpy()
        rows = {name: values[: len(unit)] for name, values in buffer.items()}
        squared_norms = _squared_norms(rows)
        skipped = _nonfinite(unit, rows, losses, squared_norms)
        if skipped and config.on_nonfinite == "raise":
            sample, reason = next(iter(skipped.items()))
            raise NonFiniteError(
                f"sample {sample}: {reason}. Everything before it is kept. Remove the sample, use a wider --dtype, or "
                "leave such samples out, counted and named, with --on-nonfinite skip."
            )
        for sample in skipped:
            offset = sample - unit.start
            squared_norms[offset], targets[offset] = 0.0, 0
            for values in rows.values():
                values[offset].zero_()
        yield UnitRecord(unit, rows, losses, targets, squared_norms, skipped)


def _create_or_resume(
    path: Path,
    model: nn.Module,
    engine: GradientEngine,
    found: Survey,
    config: SpectralConfig,
    description: str | None,
    progress: bool,
) -> None:
    """Make the run's folder, or check that what is there is this very run."""
    resuming = (path / "manifest.json").is_file()
    manifest = make_manifest(model, engine, found, config, description)
    parameters = {name: info.numel for name, info in engine.parameters.items()}
    store_dtype = config.dtype_store or engine.row_dtype
    plan = planner.plan_store(
        len(found.samples), parameters, store_dtype, centered=config.store_centered, chunk_rows=config.chunk_size
    )
    planner.check_row_buffer(sum(parameters.values()), min(config.chunk_size, len(found.samples)), engine.row_dtype)
    if resuming:
        store = RunStore(path)
        found_differences = differences(store.manifest, manifest)
        if found_differences:
            raise RunMismatchError(
                f"{path} cannot be resumed, because it was made otherwise:\n  - "
                + "\n  - ".join(found_differences)
                + "\nUse the same model, data and settings, or another folder."
            )
        left = len(store.todo()) / max(len(store.units), 1)
        planner.check_disk(path, int(plan.gradients * left) + plan.grams)
        return
    check_free(path)
    planner.check_disk(path, plan.total)
    report = engine.probe(to_model(probe_batch(found), model))
    if progress:
        tqdm.write(report.summary())
    path.mkdir(parents=True, exist_ok=True)
    with RunLock(path):
        RunStore.create(path, dataclasses.replace(manifest, probe=report.to_dict()))


def make_manifest(
    model: nn.Module,
    engine: GradientEngine,
    found: Survey,
    config: SpectralConfig,
    description: str | None,
    report: ProbeReport | None = None,
) -> Manifest:
    """Return the facts of a run that is about to start; `report` is what the probe found, once it has run."""
    store_dtype = config.dtype_store or engine.row_dtype
    itemsize = torch.finfo(store_dtype).bits // 8
    n = len(found.samples)
    return Manifest(
        config=config.to_dict(),
        identity=config.identity(),
        model=model_manifest(model),
        parameters=[
            {
                "name": info.name,
                "shape": list(info.shape),
                "dtype": dtype_name(info.dtype),
                "chunk_columns": chunk_columns(info.numel, n, config.chunk_size, itemsize),
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


def _row_pass(
    store: RunStore, engine: GradientEngine, found: Survey, config: SpectralConfig, state: PartialState, progress: bool
) -> None:
    todo = store.todo()
    mean = {name: store.mean(name, 0, columns) for name, columns in store.parameters.items()} if store.centered else {}
    with _bar("gradients", store, todo, state, progress) as bar:
        for record in gradient_units(engine, found, todo[state.process_index :: state.num_processes], config):
            if mean:
                record = _subtract(record, mean)
            rows = {name: values.cpu() for name, values in record.rows.items()}
            store.write_unit(UnitRecord(**{**vars(record), "rows": rows}))
            bar.update(len(record.unit))


def _mean_pass(
    store: RunStore, engine: GradientEngine, found: Survey, config: SpectralConfig, state: PartialState, progress: bool
) -> None:
    """Add up the rows of every unit in float64; the mean is their sum over the valid samples."""
    if (store.path / "done" / "mean.json").is_file():
        return
    todo = store.todo("mean")
    with _bar("mean", store, todo, state, progress) as bar:
        for record in gradient_units(engine, found, todo[state.process_index :: state.num_processes], config):
            sums = {name: rows.sum(dim=0, dtype=torch.float64).cpu().numpy() for name, rows in record.rows.items()}
            store.write_mean_part(record.unit, sums, len(record.unit) - len(record.skipped))
            bar.update(len(record.unit))
    state.wait_for_everyone()
    if state.is_main_process:
        store.finish_mean()
    state.wait_for_everyone()


def _subtract(record: UnitRecord, mean: dict[str, np.ndarray | None]) -> UnitRecord:
    """Return the record with the mean gradient subtracted from its valid rows, in float64 before rounding."""
    valid = torch.ones(len(record.unit), dtype=torch.bool)
    valid[[sample - record.unit.start for sample in record.skipped]] = False
    rows = {}
    for name, values in record.rows.items():
        center = torch.from_numpy(np.asarray(mean[name])).to(values.device)
        rows[name] = (values - center * valid.to(values.device)[:, None]).to(values.dtype)
    return UnitRecord(**{**vars(record), "rows": rows, "squared_norms": _squared_norms(rows)})


def _squared_norms(rows: dict[str, Tensor]) -> np.ndarray:
    """Return (n, K) float64: the squared norm of each row of each parameter."""
    columns = []
    for values in rows.values():
        squared = torch.linalg.vecdot(values, values).double()
        extreme = ~((squared > 1e-30) & (squared < 1e30))
        if bool(extreme.any()):  # near the ends of float32's range the square is formed in float64
            wide = values[extreme].double()
            squared[extreme] = torch.linalg.vecdot(wide, wide)
        columns.append(squared)
    return torch.stack(columns, dim=1).cpu().numpy()


def _nonfinite(unit: Unit, rows: dict[str, Tensor], losses: np.ndarray, squared_norms: np.ndarray) -> dict[int, str]:
    """Return `{sample number: what is not finite}`."""
    found = {}
    names = list(rows)
    for offset in range(len(unit)):
        if not np.isfinite(losses[offset]):
            found[unit.start + offset] = f"the loss is {losses[offset]}"
        elif not np.isfinite(squared_norms[offset]).all():
            bad = names[int(np.flatnonzero(~np.isfinite(squared_norms[offset]))[0])]
            found[unit.start + offset] = f"the gradient of {bad} is not finite"
    return found


def _lock(path: Path, state: PartialState) -> contextlib.AbstractContextManager[Any]:
    """Return the run's lock on rank 0, which stands for all ranks."""
    return RunLock(path) if state.is_main_process else contextlib.nullcontext()


def _bar(what: str, store: RunStore, todo: Sequence[Unit], state: PartialState, progress: bool) -> tqdm:
    left = sum(len(unit) for unit in todo[state.process_index :: state.num_processes])
    share = sum(len(unit) for unit in store.units[state.process_index :: state.num_processes])
    return tqdm(
        total=max(share, left),
        initial=max(share - left, 0),
        desc=what,
        unit="sample",
        disable=not (progress and state.is_main_process and todo),
    )
