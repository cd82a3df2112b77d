"""Labels drawn from a model's own predictive distribution: the Monte-Carlo true Fisher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from streamfisher.data.batches import IGNORED_LABEL
from streamfisher.errors import LossError
from streamfisher.models.losses import PerSampleLoss


def sample_seed(seed: int, number: int) -> int:
    """Return a 63-bit seed for sample `number`, the same in every process and whatever batch the sample is in."""
    digest = hashlib.sha256(f"streamfisher:{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_labels(
    model: nn.Module, batch: Mapping[str, Any], loss: PerSampleLoss, seeds: Sequence[int]
) -> dict[str, Any]:
    """Return `batch` with labels drawn from the model's own predictive distribution (Monte-Carlo true Fisher).

    Each sample has its own generator, so its draw depends on its seed and position only, not on its batch. Tokens are
    drawn by inverting the cumulative distribution at a uniform number, given the data's own context (teacher forcing),
    and only where the data has a target. Regression draws `y ~ N(f, 1)`.

    Args:
        model: the model, in the mode in which it is to be analysed.
        batch: a dict of batched tensors.
        loss: what `resolve_loss` returned.
        seeds: one per sample, see `sample_seed`.

    Raises:
        LossError: the loss gives no predictive distribution (the user's own, or the model's scalar).
    """
    if loss.function is not None or loss.sequential:
        raise LossError(f"labels='model' needs a predictive distribution, which the loss {loss.name!r} does not give.")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        logits = loss.logits(model, batch)
    if loss.name == "regression":
        noise = torch.stack([torch.randn(logits.shape[1:], generator=g, dtype=torch.float64) for g in generators])
        return {**batch, "labels": logits + noise.to(logits)}
    cumulative = logits.double().softmax(-1).cumsum(-1)
    shape = logits.shape[1:-1]
    uniform = torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) for g in generators])
    # The cumulative distribution may end a rounding below 1: scaling the draw keeps it inside.
    uniform = uniform.to(cumulative.device).unsqueeze(-1) * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, uniform, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    if loss.name == "classification":
        return {**batch, "labels": drawn}
    drawn = torch.where(loss.targets(batch) == IGNORED_LABEL, IGNORED_LABEL, drawn)
    if loss.name == "causal":
        shifted = torch.full_like(drawn, IGNORED_LABEL)
        shifted[:, 1:] = drawn[:, :-1]
        drawn = shifted
    return {**batch, "labels": drawn}
