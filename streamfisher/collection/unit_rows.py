"""The gradients of one unit of samples after the other, checked for what is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from streamfisher.collection.guard import SharedGuard, check_sums, guarded_names, only
from streamfisher.collection.survey import Survey
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import Unit, collate, make_batches
from streamfisher.errors import DataError, LossError, NonFiniteError
from streamfisher.gradients import GradientEngine
from streamfisher.gradients.factors import FactorPair, pack
from streamfisher.gradients.norms import batch_norms
from streamfisher.models.model_labels import draw_labels, sample_seed
from streamfisher.models.offload import to_model
from streamfisher.sinks.interface import Captured
from streamfisher.store import UnitRecord


def gradient_units(
    engine: GradientEngine,
    found: Survey,
    units: Iterable[Unit],
    config: SpectralConfig,
    *,
    captured: Captured | None = None,
    batch_tokens: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
    shared_guard: SharedGuard | None = None,
) -> Iterator[UnitRecord]:
    """Yield the gradients of each unit. The rows are views of one buffer that the next unit overwrites.

    Args:
        engine: entered and probed.
        found: the samples.
        units: taken one after the other, when the one before is done with.
        config: `labels`, `guard_every` and `on_nonfinite` count here.
        captured: which parameters, and how; `None` means rows of all.
        batch_tokens: padded tokens of one backward pass; `None` means the config's.
        after_batch: called after each backward pass.
        shared_guard: where weights are sharded; `None` without it, and the guard is each rank's own.

    Raises:
        NonFiniteError: a loss or gradient is not finite and `config.on_nonfinite == 'raise'`; names the sample.
    """
    captured = captured or Captured(list(engine.parameters))
    buffer: dict[str, Tensor] = {}
    for unit in units:
        buffer = buffer or engine.allocate(min(config.chunk_size, len(found.samples)), captured.dense, captured.columns)
        numbers = range(unit.start, unit.stop)
        losses, targets = np.empty(len(unit)), np.empty(len(unit), dtype=np.int64)
        norms = {name: np.zeros(len(unit)) for name in captured.names}
        skipped: dict[int, str] = {}
        markers = []
        batches = make_batches([found.lengths[number] for number in numbers], batch_tokens or config.batch_tokens)
        for index, batch_range in enumerate(batches):
            where = slice(batch_range.start, batch_range.stop)
            first = unit.start + batch_range.start
            batch = to_model(collate([found.samples[unit.start + offset] for offset in batch_range]), engine.model)
            rows = {name: values[where] for name, values in buffer.items()}
            with _naming_samples(first, unit.start + batch_range.stop - 1):
                if config.labels == "model":
                    seeds = [sample_seed(config.seed, unit.start + offset) for offset in batch_range]
                    batch = draw_labels(engine.model, batch, found.loss, seeds)
                result = engine.rows(batch, rows, captured.factored)
            if shared_guard is not None:
                shared_guard.step(rows, result.factors)
            elif where.start == 0 and config.guard_every and unit.index % config.guard_every == 0:
                names = guarded_names(engine, captured.names, unit.index // config.guard_every)
                check_sums(engine, engine.guard(batch, only(rows, names), only(result.factors, names)), unit)
            after_batch()
            losses[where], targets[where] = result.losses.numpy(), result.n_targets.numpy()
            for name, values in batch_norms(rows, result.factors, len(batch_range)).items():
                norms[name][where] = values
            bad = _nonfinite(range(first, first + len(batch_range)), losses[where], norms, where)
            if bad and config.on_nonfinite == "raise":
                sample, reason = next(iter(bad.items()))
                raise NonFiniteError(
                    f"sample {sample}: {reason}. Everything before it is kept. Remove the sample, use a wider --dtype, "
                    "or leave such samples out, counted and named, with --on-nonfinite skip."
                )
            skipped |= bad
            if captured.write_factors is not None and result.factors:
                packed = pack(_on_cpu(result.factors), dropped=[sample - first for sample in bad])
                markers.append(captured.write_factors(unit, index, first, packed))
            del result
        for sample in skipped:
            offset = sample - unit.start
            targets[offset] = 0
            for values in norms.values():
                values[offset] = 0.0
            for values in buffer.values():
                values[offset].zero_()
        rows = {name: values[: len(unit)] for name, values in buffer.items()}
        yield UnitRecord(unit, rows, losses, targets, norms, skipped, markers)


def _on_cpu(factors: Mapping[str, Sequence[FactorPair]]) -> dict[str, list[FactorPair]]:
    """Return factors in host memory, a tensor that several pairs share copied once."""
    copies: dict[int, Tensor] = {}

    def take(side: Tensor) -> Tensor:
        return copies.setdefault(id(side), side.cpu())

    return {name: [FactorPair(take(pair.left), take(pair.right)) for pair in pairs] for name, pairs in factors.items()}


def idle_passes(
    engine: GradientEngine,
    found: Survey,
    config: SpectralConfig,
    captured: Captured,
    count: int,
    shared_guard: SharedGuard,
) -> None:
    """Take part in `count` passes of sharded weights without a batch of this rank: sample 0, whose rows are dropped."""
    rows = engine.allocate(1, captured.dense, captured.columns) if count else {}
    for _ in range(count):
        batch = to_model(collate([found.samples[0]]), engine.model)
        if config.labels == "model":
            batch = draw_labels(engine.model, batch, found.loss, [sample_seed(config.seed, 0)])
        result = engine.rows(batch, rows, captured.factored)
        shared_guard.step(rows, result.factors)


@contextlib.contextmanager
def _naming_samples(first: int, last: int) -> Iterator[None]:
    """Say of a label or token id that the model does not know which samples of the data it may come from."""
    try:
        yield
    except (LossError, IndexError) as error:
        bad = [first + offset for offset in getattr(error, "samples", [])]
        which = f"sample {bad[0]}" if bad else f"samples {first} to {last}"
        raise DataError(
            f"{which}: {str(error).rstrip('.')}. Token ids and labels must lie in the model's vocabulary."
        ) from error


def _nonfinite(samples: range, losses: np.ndarray, norms: Mapping[str, np.ndarray], where: slice) -> dict[int, str]:
    """Return `{sample number: what is not finite}` of a batch, `where` being its place in the unit's norms."""
    found = {}
    for place, sample in enumerate(samples):
        if not np.isfinite(losses[place]):
            found[sample] = f"the loss is {losses[place]}"
            continue
        bad = next((name for name, values in norms.items() if not np.isfinite(values[where][place])), None)
        if bad is not None:
            found[sample] = f"the gradient of {bad} is not finite"
    return found
