"""Model and loss behave as they did when a run was made: what no name and no hash of weights can say.

A loss is known by its name, a model by its class and its values. Another function of that name, or another activation
between the same weights, has the same ones. So whoever resumes a run, or adds samples to it, takes the gradients of one
of its batches again: losses and norms are stored with every sample, and are the fingerprint of what the code does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from streamfisher.data.batches import BatchRef, Unit
from streamfisher.errors import CorruptRunError, RunMismatchError
from streamfisher.gradients.norms import batch_norms, squared_norms_of
from streamfisher.gradients.producer import Asked, BatchGradients, GradientProducer, Wave
from streamfisher.models.batches import ModelBatches
from streamfisher.store import RunStore, stage_of
from streamfisher.store.arrays import values_of
from streamfisher.store.names import node_name

#: How much further values of another device, or of products of another precision, may be from the stored ones; and the
#: most that then counts as agreement.
_ELSEWHERE, _MOST = 100.0, 0.2
#: Loss of a target below which rounding is no longer small against it: a loss is a difference of numbers of order one.
_SMALL_LOSS = 0.01
#: Of the samples, this part may differ: one that a router sends elsewhere says nothing about the model.
_ODD = 8


def arithmetic_of(device: torch.device) -> str:
    """Return what decides how products are rounded beside their dtype, in words for the manifest."""
    precision = torch.get_float32_matmul_precision()
    return device.type if precision == "highest" else f"{device.type}, float32 products in {precision!r} precision"


@dataclass(frozen=True)
class _Stored:
    """What a run knows of one of its batches, of B samples."""

    wave: int
    batch: BatchRef
    valid: np.ndarray  # (B,) bool
    n_targets: np.ndarray  # (B,)
    losses: np.ndarray  # (B,)
    norms: np.ndarray  # (B, K), of the wave's parameters


def check_behaviour(store: RunStore, producer: GradientProducer, batches: ModelBatches) -> None:
    """Refuse to go on with a run whose losses and gradients the model and the loss no longer give.

    It costs one batch; one unit, where only sums for the mean of rows that are to be centered are there. All ranks do
    it: with sharded weights they must, and each of them has code of its own. A run without a finished unit has nothing
    to compare, and values that are damaged are left to `verify`.

    Args:
        store: of the run as it was left, before it grows.
        producer: entered, with the run's routes.
        batches: of the run's units.

    Raises:
        RunMismatchError: they differ; the message names a sample with both values.
    """
    allowed = producer.tolerance
    then = store.manifest.layout.get("arithmetic", "a device that it does not name")
    now = arithmetic_of(producer.device)
    if then != now:
        allowed = max(allowed, min(_ELSEWHERE * allowed, _MOST))
    found = _stored_batch(store, batches)
    if found is not None:
        difference = _difference(found, *_taken_again(store, producer, batches, found), allowed, batches)
    else:
        difference = _difference_of_mean(store, producer, batches, allowed)
    if difference is None:
        return
    elsewhere = "" if then == now else f" (the run was made on {then}, and this is {now})"
    raise RunMismatchError(
        f"{store.path} cannot be resumed, because model or loss compute something else than when it was made:\n"
        f"  - {difference}.\nNames, weights and data are the same, and relative differences up to {allowed:.0e} pass "
        f"as rounding{elsewhere}. Another loss function of the same name does this, another activation, scale or "
        "setting in the model's code, or another version of a library. Use what the run was made with, or another "
        "folder."
    )


def _stored_batch(store: RunStore, batches: ModelBatches) -> _Stored | None:
    """Return the first batch of the first finished unit that has a valid sample and can be read; `None`: none has."""
    if store.centered and not (store.path / "done" / "mean.json").is_file():
        return None  # as after a repair: the mean that the rows are less of is added up again
    columns = {name: column for column, name in enumerate(store.parameters)}
    for wave, names in enumerate(store.waves):
        for index in sorted(store.markers.done_units(stage_of(wave))):
            unit = store.units[index]
            values = _values_of(store, unit, wave)
            if values is None:
                continue
            norms = np.sqrt(values["squared_norm"][:, [columns[name] for name in names]])
            for batch in batches.of(unit):
                of = slice(batch.start - unit.start, batch.stop - unit.start)
                valid = values["valid"][of] == 1
                if valid.any():
                    return _Stored(wave, batch, valid, values["n_targets"][of], values["loss"][of], norms[of])
    return None


def _values_of(store: RunStore, unit: Unit, wave: int) -> dict[str, np.ndarray] | None:
    """Return what is stored of the samples of a unit; `None` where it is damaged."""
    try:
        values = {what: store.samples.read_unit(what, unit) for what in ("loss", "valid", "n_targets", "squared_norm")}
        for what, read in values.items():
            store.samples.check(what, unit, read, [wave])
    except (CorruptRunError, ValueError, RuntimeError, OSError):
        return None
    return values


def _taken_again(
    store: RunStore, producer: GradientProducer, batches: ModelBatches, found: _Stored
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return losses (B,) of a batch, norms (B, K) of its gradients as they are stored, and of the whole ones (B,)."""
    names = store.waves[found.wave]
    factored = [name for name in names if store.rows.representation(name) == "factors"]
    wave = Wave(found.wave, tuple(names), batches, (found.batch,))
    gradients = _gradients(store, producer, wave, factored)
    squares = batch_norms(gradients.rows, gradients.factors, len(found.batch))
    whole = np.sqrt(sum(squares.values()))
    if store.centered:
        for name, rows in gradients.rows.items():
            mean = torch.from_numpy(np.asarray(store.means.mean(name, 0, rows.shape[1]))).to(rows.device)
            squares |= squared_norms_of({name: (rows - mean).to(rows.dtype)})
    return gradients.losses.numpy(), np.sqrt(np.stack([squares[name] for name in names], axis=1)), whole


def _gradients(store: RunStore, producer: GradientProducer, wave: Wave, factored: Collection[str]) -> BatchGradients:
    """Take the gradients of the one batch of a wave."""
    (batch,) = wave.todo
    dense = [name for name in wave.parameters if name not in factored]
    producer.begin(wave)
    return producer.gradients(batch, Asked(producer.allocate(len(batch), dense, store.parameters), factored))


def _difference(
    found: _Stored,
    losses: np.ndarray,
    norms: np.ndarray,
    whole: np.ndarray,
    tolerance: float,
    batches: ModelBatches,
) -> str | None:
    """Return in words where a batch differs from what is stored of it; `None` where it does not.

    A sample is judged by its loss and by the norms of its gradients, relative to the mean of its own and the batch's,
    so that what nearly vanishes is not judged by its rounding; the batch is judged as a whole too.
    """
    valid = found.valid
    change = np.abs(losses - found.losses)[valid]
    size = np.abs(found.losses[valid])
    moved = np.linalg.norm(norms - found.norms, axis=1)[valid]
    # The larger one: centered rows may be a small rest of the gradients.
    scale = np.fmax(np.linalg.norm(found.norms, axis=1), whole)[valid]
    worst = np.maximum(_over(change, size + size.mean()), _over(moved, scale + scale.mean())) * 2
    together = max(_over(change.sum(), size.sum()), _over(np.linalg.norm(moved), np.linalg.norm(scale)))
    level = size.sum() / np.maximum(found.n_targets[valid], 1).sum()
    allowed = tolerance * (1 + _SMALL_LOSS / level) if level else np.inf
    drawn = batches.label_seed is not None  # of probabilities that are rounded otherwise, another label now and then
    odd = ~(worst <= allowed)  # NaN is a difference too
    if odd.sum() <= len(odd) // (2 if drawn else _ODD) and (drawn or together <= allowed):
        return None
    at = int(np.flatnonzero(valid)[np.argmax(np.nan_to_num(worst, nan=np.inf))])
    return (
        f"sample {found.batch.start + at} has the loss {found.losses[at]:.6g} and a gradient of norm "
        f"{np.linalg.norm(found.norms[at]):.6g} in the run; now they are {losses[at]:.6g} and "
        f"{np.linalg.norm(norms[at]):.6g}"
    )


def _difference_of_mean(
    store: RunStore, producer: GradientProducer, batches: ModelBatches, tolerance: float
) -> str | None:
    """Return in words where the sums of a unit's rows, of a mean that is being formed, are not what is stored."""
    done = sorted(store.markers.done_units("mean")) if store.centered else []
    unit = next((store.units[index] for index in done if not store.means.wrong_parts(store.units[index])), None)
    if unit is None:
        return None
    names = tuple(store.parameters)
    sums = {name: torch.zeros(store.parameters[name], dtype=torch.float64) for name in names}
    square = 0.0
    for batch in batches.of(unit):
        gradients = _gradients(store, producer, Wave(0, names, batches, (batch,)), ())
        squares = np.sum([*batch_norms(gradients.rows, {}, len(batch)).values()], axis=0)
        valid = np.isfinite(squares) & np.isfinite(gradients.losses.numpy())
        square += float(squares[valid].sum())
        for name, rows in gradients.rows.items():
            sums[name] += rows[torch.from_numpy(valid).to(rows.device)].sum(dim=0, dtype=torch.float64).cpu()
    off = 0.0
    for name, total in sums.items():
        part = values_of(store.run.array(f"mean_parts/{node_name(name)}"), unit.index)
        off += float(np.square(total.numpy() - part).sum())
    if off**0.5 <= tolerance * square**0.5:
        return None
    return (
        f"the gradients of samples {unit.start} to {unit.stop - 1} add up to another sum than in the run, by "
        f"{off**0.5:.3g}; the root of their squared norms is {square**0.5:.3g}"
    )


def _over(difference: np.ndarray | np.floating, size: np.ndarray | np.floating) -> np.ndarray:
    """Return the quotient; 0 where nothing differs."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / size)
