"""Engine rows of a zoo model against the float64 loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import float64_loop
import numpy as np
import torch

from streamfisher.gradients import GradientEngine, ProbeReport
from streamfisher.models import PerSampleLoss, batch_size, resolve_loss


@dataclass(frozen=True)
class Outcome:
    report: ProbeReport
    loss: PerSampleLoss
    trainable: int
    captured: int
    errors: dict[str, float]  # norm-relative over all samples, or relative to the rounding of the whole gradient
    guard: float
    tolerance: float

    @property
    def worst(self) -> float:
        return max(self.errors.values())


@contextlib.contextmanager
def double_throughout() -> Iterator[None]:
    """Keep float64 tensors in float64 where a model's code asks for float32.

    Many models compute norms and softmax in float32 whatever their dtype. Then plain autograd itself is only repeatable
    to 1e-7, and 1e-10 could not be asked of anything.
    """
    as_float, to, softmax = torch.Tensor.float, torch.Tensor.to, torch.nn.functional.softmax

    def keep(tensor, *args, **kwargs):
        return tensor if tensor.dtype == torch.float64 else as_float(tensor, *args, **kwargs)

    def keep_to(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return tensor
        return to(tensor, *args, **kwargs)

    def keep_softmax(tensor, dim=None, _stacklevel=3, dtype=None):
        return softmax(tensor, dim=dim, dtype=None if tensor.dtype == torch.float64 else dtype)

    with (
        mock.patch.object(torch.Tensor, "float", keep),
        mock.patch.object(torch.Tensor, "to", keep_to),
        mock.patch.object(torch.nn.functional, "softmax", keep_softmax),
    ):
        yield


def cast(batch: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def compare(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], dtype: torch.dtype, loss=None, **options
) -> Outcome:
    """Rows of `batch` against autograd, one sample at a time, in float64, with the same loss function."""
    batch = cast(batch, dtype)
    with double_throughout():
        return _compare(model, batch, dtype, loss, **options)


def _compare(model, batch, dtype, loss, **options) -> Outcome:
    model = model.to(dtype)
    chosen = resolve_loss(model, batch, loss)
    n = batch_size(batch)
    with GradientEngine(model, chosen, **options) as engine:
        report = engine.probe(batch)
        out = engine.allocate(n)
        for rows in out.values():
            rows.fill_(float("nan"))
        engine.rows(batch, out)
        guard = max(engine.guard(batch, out).values())
        tolerance = engine.tolerance
    samples = [{key: value[i] for key, value in batch.items()} for i in range(n)]
    truth = float64_loop.gradient_rows(model, samples, chosen)
    whole = sum(np.linalg.norm(rows) ** 2 for rows in truth.values()) ** 0.5
    floor = 1e-4 * whole  # of gradients that are zero but for rounding, as of an attention's key bias
    errors = {
        name: float(np.linalg.norm(out[name].double().numpy() - truth[name]) / max(np.linalg.norm(truth[name]), floor))
        for name in out
    }
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    captured = sum(rows.shape[1] for rows in out.values())
    return Outcome(report, chosen, trainable, captured, errors, guard, tolerance)
