"""Plain autograd: the probe's reference, the guard's batch gradient, and the path for what no rule can do.

The parameters that are asked for require grad for the time of one pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from streamfisher.errors import CaptureError
from streamfisher.gradients.capture import Capture
from streamfisher.gradients.parameters import Slot
from streamfisher.gradients.state import inputs_of_checkpoints
from streamfisher.models.calling import batch_size, sample_of
from streamfisher.models.losses import PerSampleLoss
from streamfisher.models.offload import used_leaves
from streamfisher.models.sharding import reshard, whole

if TYPE_CHECKING:
    from streamfisher.gradients.projection import Sides


class PlainAutograd:
    """Gradients of a frozen model's loss by ordinary backward passes; `capture`'s hooks do nothing meanwhile."""

    def __init__(self, model: nn.Module, loss: PerSampleLoss, capture: Capture, slots: Sequence[Slot] = ()) -> None:
        self.model, self.loss, self.capture, self.slots = model, loss, capture, slots

    def gradients(
        self,
        batch: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        index: int | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the loss and its flat gradients.

        Args:
            batch: a dict of batched tensors.
            tensors: the parameters to differentiate by.
            index: the sample whose loss to differentiate; None: the sum.
            weights: (B,) of the losses in that sum; None: each counts once.
        """
        offloaded = {name: tensor for name, tensor in tensors.items() if tensor.is_meta}
        if offloaded:
            return self._offloaded(batch, tensors, offloaded, index, weights)
        with self._requiring(tensors.values()):
            loss = _chosen(self.loss(self.model, batch), index, weights)
            grads = gradients_of(loss, list(tensors.values()))
        flat = {n: None if g is None else whole(g.detach()).reshape(-1) for n, g in zip(tensors, grads, strict=True)}
        return loss.detach(), flat

    def one_by_one(
        self,
        batch: Mapping[str, Any],
        out: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        projected: Mapping[str, Sides] | None = None,
    ) -> Tensor:
        """Fill the rows of `tensors` in `out` by a forward and backward pass for each sample; return the losses."""
        if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            raise CaptureError(
                f"{', '.join(list(tensors)[:5])} need a pass per sample, and with sharded weights (--fsdp) such passes "
                "would mix the samples of all ranks. Leave them out with --exclude, or use --device-map."
            )
        losses = []
        for i in range(batch_size(batch)):
            loss, grads = self.gradients(sample_of(batch, i), tensors)
            for name, grad in grads.items():
                if grad is None:
                    out[name][i].zero_()
                elif projected and name in projected:
                    row = grad.to(device=out[name].device, dtype=out[name].dtype)
                    out[name][i].copy_(projected[name].project(row)[0])
                else:
                    out[name][i].copy_(grad)
            losses.append(loss)
        return torch.stack(losses)

    def _offloaded(
        self,
        batch: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        offloaded: Mapping[str, Tensor],
        index: int | None,
        weights: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """As `gradients`, for a model of which some weights are loaded for each call only."""
        places = {name: [slot.name for slot in self.slots if slot.parameter == name] or [name] for name in offloaded}
        here = {name: tensor for name, tensor in tensors.items() if name not in offloaded}
        with self._requiring(here.values()), used_leaves(self.model, places) as used:
            loss = _chosen(self.loss(self.model, batch), index, weights)
            found = dict(zip(here, gradients_of(loss, list(here.values())), strict=True))
        for name, leaves in used.items():
            parts = [leaf.grad for leaf in leaves if leaf.grad is not None]
            found[name] = sum(parts[1:], parts[0]) if parts else None
        grads = {name: found[name] for name in tensors}
        return loss.detach(), {n: None if grad is None else grad.detach().reshape(-1) for n, grad in grads.items()}

    @contextlib.contextmanager
    def _requiring(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        checkpoints = inputs_of_checkpoints(self.model, self.capture)
        with self.capture.suspended(), torch.enable_grad(), requiring_grad(tensors), checkpoints:
            reshard(self.model)  # what is still whole would not be told that it requires grad now
            yield
        reshard(self.model)


def _chosen(losses: Tensor, index: int | None, weights: Tensor | None) -> Tensor:
    if index is not None:
        return losses[index]
    return losses.sum() if weights is None else (losses * weights.to(losses)).sum()


def gradients_of(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of leaves by `backward`, because reentrant checkpointing refuses `torch.autograd.grad`."""
    before = [tensor.grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.grad = None
        if loss.requires_grad:
            loss.backward()
        grads = [tensor.grad for tensor in tensors]
        return [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in grads]
    finally:
        for tensor, grad in zip(tensors, before, strict=True):
            tensor.grad = grad


@contextlib.contextmanager
def requiring_grad(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let leaves require grad inside, and be frozen afterwards."""
    tensors = list(tensors)
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)
