"""The gradients of one unit of samples after the other, checked for what is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from streamfisher.config import SpectralConfig
from streamfisher.errors import DataError, LossError, NonFiniteError
from streamfisher.gradients import GradientEngine
from streamfisher.losses import draw_labels, sample_seed
from streamfisher.samples import Unit, collate, make_batches
from streamfisher.sharded_guard import SharedGuard, check_sums
from streamfisher.store import UnitRecord
from streamfisher.survey import Survey, to_model


def gradient_units(
    engine: GradientEngine,
    found: Survey,
    units: Iterable[Unit],
    config: SpectralConfig,
    *,
    after_batch: Callable[[], None] = lambda: None,
    shared_guard: SharedGuard | None = None,
) -> Iterator[UnitRecord]:
    """Yield the gradients of each unit. The rows are views of one buffer that the next unit overwrites.

    Args:
        engine: entered and probed.
        found: the samples.
        units: taken one after the other, when the one before is done with.
        config: `batch_tokens`, `labels`, `guard_every` and `on_nonfinite` count here.
        after_batch: called after each backward pass.
        shared_guard: where weights are sharded; `None` without it, and the guard is each rank's own.

    Raises:
        NonFiniteError: a loss or gradient is not finite and `config.on_nonfinite == 'raise'`; names the sample.
    """
    buffer: dict[str, Tensor] = {}
    for unit in units:
        buffer = buffer or engine.allocate(min(config.chunk_size, len(found.samples)))
        numbers = range(unit.start, unit.stop)
        losses, targets = np.empty(len(unit)), np.empty(len(unit), dtype=np.int64)
        for batch_range in make_batches([found.lengths[number] for number in numbers], config.batch_tokens):
            where = slice(batch_range.start, batch_range.stop)
            batch = to_model(collate([found.samples[unit.start + offset] for offset in batch_range]), engine.model)
            rows = {name: values[where] for name, values in buffer.items()}
            with _naming_samples(unit.start + batch_range.start, unit.start + batch_range.stop - 1):
                if config.labels == "model":
                    seeds = [sample_seed(config.seed, unit.start + offset) for offset in batch_range]
                    batch = draw_labels(engine.model, batch, found.loss, seeds)
                result = engine.rows(batch, rows)
            if shared_guard is not None:
                shared_guard.step(rows)
            elif where.start == 0 and config.guard_every and unit.index % config.guard_every == 0:
                check_sums(engine, engine.guard(batch, rows), unit)
            after_batch()
            losses[where], targets[where] = result.losses.numpy(), result.n_targets.numpy()
        rows = {name: values[: len(unit)] for name, values in buffer.items()}
        squared_norms = squared_norms_of(rows)
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


def idle_passes(
    engine: GradientEngine, found: Survey, config: SpectralConfig, count: int, shared_guard: SharedGuard
) -> None:
    """Take part in `count` passes of sharded weights without a batch of this rank: sample 0, whose rows are dropped."""
    rows = engine.allocate(1) if count else {}
    for _ in range(count):
        batch = to_model(collate([found.samples[0]]), engine.model)
        if config.labels == "model":
            batch = draw_labels(engine.model, batch, found.loss, [sample_seed(config.seed, 0)])
        engine.rows(batch, rows)
        shared_guard.step(rows)


@contextlib.contextmanager
def _naming_samples(first: int, last: int) -> Iterator[None]:
    """Say of a label or token id that the model does not know which samples of the data it may come from."""
    try:
        yield
    except (LossError, IndexError) as error:
        bad = [first + offset for offset in getattr(error, "samples", [])]
        which = f"sample {bad[0]}" if bad else f"samples {first} to {last}"
        raise DataError(f"{which}: {error}. Token ids and labels must lie in the model's vocabulary.") from error


def squared_norms_of(rows: dict[str, Tensor]) -> np.ndarray:
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
