"""Plain autograd on each sample alone: what the probe compares rows with, and whether it is a reference at all.

A sample's gradient must not depend on its batch mates, and a batch of one is not always what it seems: some models heed
the mask of larger batches only, and some kernels are wrong for one sample. So where a sample in its batch differs from
the sample alone, it is also taken without its padding, and twice in one batch. What agrees then is how samples are
taken alone from there on.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streamfisher.errors import LossError
from streamfisher.gradients.modes import of_batch_norms
from streamfisher.gradients.norms import distance, norm
from streamfisher.gradients.passes import GradientPasses
from streamfisher.gradients.plain import ALONE
from streamfisher.gradients.tolerance import COUPLING


@dataclass
class Reference:
    """Plain autograd on each sample alone."""

    rows: list[dict[str, Tensor | None]]  # per sample: parameter -> flat gradient, None where it has none; of one part
    norms: list[float]  # per sample: norm of the gradient over all trainable parameters
    losses: list[float]
    squares: dict[str, float]  # captured parameter -> squared norm over the samples
    total: float  # squared norm over the samples and all trainable parameters

    def take(self, engine: GradientPasses, batch: Mapping[str, Any], part: Sequence[str]) -> None:
        """Hold the rows of one part instead of those of another, which are freed first."""
        self.rows = []
        self.rows = [engine.gradients_alone(batch, i, names=part)[1] for i in range(len(self.losses))]


def make_reference(
    engine: GradientPasses, batch: Mapping[str, Any], n_samples: int, parts: Sequence[Sequence[str]]
) -> Reference:
    """Return the reference of a batch, and settle how its samples are taken alone; sets the engine's `noise`.

    Args:
        engine: entered.
        batch: the samples to probe with.
        n_samples: in it.
        parts: of the captured parameters, whose gradients are taken one after the other.

    Raises:
        LossError: a sample's loss or gradient depends on the other samples of its batch, or on chance.
    """
    engine.noise = 0.0
    first: _CouplingError | None = None
    for alone in ALONE:
        engine.plain.alone = alone
        if first is not None and not (engine.plain.changes(batch) if alone == "unpadded" else first.same_losses):
            continue  # two of a sample have the same loss as one, unless the loss counts the samples of its batch
        reference = _reference(engine, batch, n_samples, parts)
        try:
            # A float64 model may compute its norms in float32: what plain autograd cannot repeat is no disagreement.
            engine.noise = _rounding(engine, batch, reference, parts)
        except _CouplingError as error:
            first = first or error
            continue
        if alone == "twice" and not _same_thrice(engine, batch, reference, parts):
            continue
        return reference
    engine.plain.alone = "as given"
    assert first is not None  # nothing else ends the loop
    raise first


def _same_thrice(
    engine: GradientPasses, batch: Mapping[str, Any], reference: Reference, parts: Sequence[Sequence[str]]
) -> bool:
    """Return whether three copies of a sample give its gradient as two do: else it depends on how many there are."""
    limit = max(engine.tolerance, COUPLING)
    for i, part in itertools.product(range(len(reference.losses)), parts):
        twice = reference.rows[i] if len(parts) == 1 else engine.gradients_alone(batch, i, names=part)[1]
        thrice = engine.gradients_among_copies(batch, i, 3, part)
        errors = [gradient_error(thrice[n], twice[n], reference.norms[i], engine.floor) for n in part]
        if any(error > limit and significant for error, significant in errors):
            return False
    return True


class _CouplingError(LossError):
    """A sample's loss or gradient is another one in its batch than alone."""

    same_losses = False  # only the gradients differ


def _reference(
    engine: GradientPasses, batch: Mapping[str, Any], n_samples: int, parts: Sequence[Sequence[str]]
) -> Reference:
    """Return losses and norms of plain autograd on each sample alone; its gradients too where there is one part."""
    squares = dict.fromkeys(engine.parameters, 0.0)
    rows, norms, losses = [], [], []
    for i in range(n_samples):
        whole = 0.0
        for index, part in enumerate(parts):
            loss, grads = engine.gradients_alone(batch, i, names=part, left_out=index == 0)
            for name, grad in grads.items():
                square = 0.0 if grad is None else norm(grad) ** 2
                whole += square
                if name in squares:
                    squares[name] += square
            if len(parts) == 1:
                rows.append({name: grads[name] for name in part})
            del grads
        norms.append(whole**0.5)
        losses.append(float(loss))
    return Reference(rows, norms, losses, squares, sum(norm**2 for norm in norms))


def _rounding(
    engine: GradientPasses, batch: Mapping[str, Any], reference: Reference, parts: Sequence[Sequence[str]]
) -> float:
    """Return the rounding between a sample's gradient in the batch and alone.

    Raises:
        LossError: it is more than rounding.
    """
    noise = 0.0
    n_samples = len(reference.losses)
    if n_samples < 2 or engine.loss.sequential:
        return noise
    limit = max(engine.tolerance, COUPLING)
    for i, part in itertools.product(range(n_samples), parts):
        loss, grads = engine.plain_gradients(batch, index=i, names=part)
        alone = reference.rows[i] if len(parts) == 1 else engine.gradients_alone(batch, i, names=part)[1]
        worst = max(
            (gradient_error(grads[n], alone[n], reference.norms[i], engine.floor) for n in part),
            key=lambda pair: pair[0] if pair[1] else 0.0,
        )
        del grads, alone
        gap = abs(float(loss) - reference.losses[i]) / max(abs(reference.losses[i]), 1e-3)
        if (worst[0] <= limit or not worst[1]) and gap <= limit:
            noise = max(noise, worst[0] if worst[1] else 0.0)
            continue
        again, _ = engine.gradients_alone(batch, i)
        if float(again) != reference.losses[i] and abs(float(again) - reference.losses[i]) > 1e-6 * abs(float(again)):
            raise LossError(
                f"The loss of one sample is {reference.losses[i]:.6g} at one time and {float(again):.6g} at the next: "
                "the model or the loss is random even in eval mode. Make it deterministic."
            )
        advice = of_batch_norms(engine.model)
        differs = f"differ by {worst[0]:.1e} (relative)"
        error = _CouplingError(
            f"The gradients of sample {i} of the batch, alone and in a batch of {n_samples}, {differs}, and its loss "
            f"of {reference.losses[i]:.6g} does not: the backward pass depends on the batch or on chance (an autograd "
            "function of one's own, a hook, a kernel that adds up in no fixed order, which use_deterministic excludes)."
            f"{advice}"
            if gap <= limit
            else f"The loss couples samples: alone, sample {i} of the batch has the loss {reference.losses[i]:.6g} and "
            f"in a batch of {n_samples} {float(loss):.6g}; its gradients {differs}. Per-sample gradients need a loss "
            f"of each sample by itself (no contrastive terms, no batch statistics).{advice}",
            samples=[i],
        )
        error.same_losses = gap <= limit
        raise error
    return noise


def gradient_error(row: Tensor | None, truth: Tensor | None, whole: float, floor: float) -> tuple[float, bool]:
    """Return the norm-relative error, and whether it is more than the rounding of the `whole` gradient's norm."""
    difference = distance(row, truth)
    if truth is None or row is None:
        return (0.0, False) if difference == 0.0 else (float("inf"), difference > floor * whole)
    size = norm(truth)
    if difference == 0.0:
        return 0.0, False
    # `not <=`, so that a NaN is an error and never an agreement.
    return (difference / size if size else float("inf")), not difference <= floor * whole
