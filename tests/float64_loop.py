"""The truth that everything is tested against: a plain autograd loop in float64, one sample at a time.

Nothing of streamfisher is imported here, so that an error in the package cannot hide itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn


def gradient_rows(
    model: nn.Module,
    samples: Sequence[Mapping[str, Tensor]],
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    dtype: torch.dtype = torch.float64,
) -> dict[str, np.ndarray]:
    """Return `{parameter name: (N, P_k) float64}`, the gradient of `loss(model, batch of one)` for each sample.

    `samples` hold tensors without a batch axis; tied parameters appear once, under their first name.
    """
    model = copy.deepcopy(model).to(dtype).eval()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in named}
    for sample in samples:
        batch = {
            key: (value.to(dtype) if value.is_floating_point() else value).unsqueeze(0) for key, value in sample.items()
        }
        value = loss(model, batch)
        grads = torch.autograd.grad(value.sum(), list(named.values()), allow_unused=True)
        for (name, parameter), grad in zip(named.items(), grads, strict=True):
            grad = torch.zeros_like(parameter) if grad is None else grad
            rows[name].append(grad.detach().reshape(-1).to(torch.float64).numpy())
    return {name: np.stack(values) for name, values in rows.items()}


def eigenvalues(rows: Mapping[str, np.ndarray], names: Sequence[str] | None = None, center: bool = False) -> np.ndarray:
    """Return the `min(N, P)` largest eigenvalues, descending, of `(1/N) G^T G` over the columns of `names`."""
    G = np.concatenate([rows[name] for name in (rows if names is None else names)], axis=1)
    if center:
        G = G - G.mean(axis=0, keepdims=True)
    return np.linalg.svd(G, compute_uv=False) ** 2 / G.shape[0]


def causal_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the (B,) sum over a sequence of next-token cross-entropies, under mask and -100 labels."""
    labels = batch.get("labels", batch["input_ids"])
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}
    logits = model(**inputs)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    targets = labels[:, 1:].clone()
    if "attention_mask" in batch:
        targets[batch["attention_mask"][:, 1:] == 0] = -100
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return losses.sum(dim=1)
