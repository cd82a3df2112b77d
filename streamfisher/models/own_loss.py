"""The chosen loss against the loss that the model computes itself: a class's name can mislead, its own loss cannot."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.data.batches import IGNORED_LABEL
from streamfisher.errors import LossError, first_line, no_memory
from streamfisher.models.calling import base_model, batch_size, call_model, find_loss, sample_of
from streamfisher.models.losses import REDUCTIONS, PerSampleLoss

#: How far two evaluations of one loss may be apart, relative, by the arithmetic of the model.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_LOW_PRECISION_TOLERANCE = 2e-2


def reproducing(model: nn.Module, batch: Mapping[str, Any], chosen: PerSampleLoss) -> PerSampleLoss:
    """Return the loss that reproduces the model's own, up to mean against sum: the chosen one, if it does.

    Nothing is compared where the user gave the loss, or where the model computes none.

    Args:
        model: run in eval mode, one sample at a time; its modes are restored.
        batch: the first batch.
        chosen: what `resolve_loss` returned.

    Raises:
        LossError: no loss known here reproduces it.
    """
    if chosen.name not in ("causal", "token", "classification", "regression") or chosen.reason == "named by the user":
        return chosen
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            if (pair := _difference(model, batch, chosen)) is None:
                return chosen
            other = {"causal": "token", "token": "causal"}.get(chosen.name)
            if other is not None:
                reason = f"it reproduces the loss that {type(base_model(model)).__name__} computes itself"
                candidate = PerSampleLoss(other, REDUCTIONS[other], reason, labels_to_model=chosen.labels_to_model)
                if _difference(model, batch, candidate) is None:
                    return candidate
    finally:
        for module, mode in modes:
            module.training = mode
    own, ours = pair
    raise LossError(
        f"{type(base_model(model)).__name__} computes a loss of {own:.6g} for the first sample; the {chosen.name!r} "
        f"loss ({chosen.reason}) gives {ours:.6g} as a sum, and no mean of it is the model's. Give loss='model' for "
        f"the model's own, loss={chosen.name!r} to take this one nevertheless, or a loss(model, batch) -> (B,) of your "
        "own."
    )


def _difference(model: nn.Module, batch: Mapping[str, Any], loss: PerSampleLoss) -> tuple[float, float] | None:
    """Return the model's own loss and ours of the first sample where they differ; `None` if they never do."""
    for index in range(batch_size(batch)):
        sample = sample_of(batch, index)
        own = _own_loss(model, sample, loss)
        if own is None:
            continue
        try:
            ours = float(loss(model, sample))
            n_targets = _n_values(loss, sample)
        except (LossError, RuntimeError, ValueError, TypeError, IndexError) as error:
            if no_memory(error):
                raise
            return own, math.nan
        # A squared error comes with a factor of a half or without; a mean is over targets, or over values.
        scales = (1.0, 1 / n_targets) if loss.name != "regression" else (1.0, 2.0, 1 / n_targets, 2 / n_targets)
        tolerance = _tolerance(model)
        if not any(math.isclose(own, ours * scale, rel_tol=tolerance, abs_tol=1e-30) for scale in scales):
            return own, ours
    return None


def _own_loss(model: nn.Module, sample: Mapping[str, Any], loss: PerSampleLoss) -> float | None:
    """Return the loss that the model computes itself on one sample, its padding masked; `None` if it computes none.

    Labels that it cannot take are warned of: then nothing is compared.
    """
    if "labels" not in inspect.signature(base_model(model).forward).parameters:
        return None
    try:
        output = call_model(model, {**sample, "labels": _labels(loss, sample)}, drop=())
    except (LossError, AttributeError, RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        if no_memory(error):
            raise
        warnings.warn(  # it wants its labels otherwise
            f"{type(base_model(model)).__name__} computes no loss of its own with the labels of the data "
            f"({type(error).__name__}: {first_line(error)}), so the {loss.name!r} loss was not compared with it.",
            stacklevel=2,
        )
        return None
    value = None if isinstance(output, Tensor) else find_loss(output)
    if value is None or value.is_meta or not value.is_floating_point() or not bool(torch.isfinite(value).all()):
        return None
    return float(value)


def _labels(loss: PerSampleLoss, sample: Mapping[str, Any]) -> Tensor:
    """Return the labels to give to the model: those of the sample, without what is no target for the loss here."""
    if loss.name not in ("causal", "token"):
        return loss.labels(sample)
    targets = loss.targets(sample)
    if loss.name == "causal":
        shifted = torch.full_like(targets, IGNORED_LABEL)
        shifted[:, 1:] = targets[:, :-1]
        return shifted
    return targets


def _n_values(loss: PerSampleLoss, sample: Mapping[str, Any]) -> int:
    count = loss.labels(sample).numel() if loss.name == "regression" else int(loss.n_targets(sample)[0])
    return max(1, count)


def _tolerance(model: nn.Module) -> float:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return max((_TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE) for dtype in dtypes), default=0.0)
