"""Plain autograd: the probe's reference, the guard's batch gradient, and the path for what no rule can do.

The parameters that are asked for require grad for the time of one pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from streamfisher.errors import CaptureError
from streamfisher.gradients.capture import Capture
from streamfisher.gradients.parameters import Slot
from streamfisher.gradients.state import inputs_of_checkpoints
from streamfisher.models.calling import batch_size, sample_of, unpadded
from streamfisher.models.kept_tensors import KeptTensors
from streamfisher.models.losses import PerSampleLoss
from streamfisher.models.offload import used_leaves
from streamfisher.models.sharding import reshard, whole

if TYPE_CHECKING:
    from streamfisher.gradients.projection import Sides

#: How a sample of a batch is taken alone: with the padding that it has there, without it, or twice in one batch.
Alone = Literal["as given", "unpadded", "twice"]
ALONE: tuple[Alone, ...] = get_args(Alone)


class PlainAutograd:
    """Gradients of a frozen model's loss by ordinary backward passes; `capture`'s hooks do nothing meanwhile."""

    def __init__(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        capture: Capture,
        slots: Sequence[Slot] = (),
        kept: KeptTensors | None = None,
    ) -> None:
        self.model, self.loss, self.capture, self.slots = model, loss, capture, slots
        self.kept = kept or KeptTensors(model)  # forgotten before every pass
        self.alone: Alone = "as given"  # settled by the probe

    def sample(self, batch: Mapping[str, Any], index: int) -> tuple[Mapping[str, Any], int | None]:
        """Return one sample of a batch alone, and the place of its loss; `None`: there is no other."""
        sample = sample_of(batch, index)
        if self.alone == "unpadded":
            return unpadded(sample, leading=True, labels=not self.loss.labels_to_model), None
        if self.alone == "twice":
            return copies(sample, 2), 0
        return sample, None

    def changes(self, batch: Mapping[str, Any]) -> bool:
        """Return whether a sample of the batch is taken alone otherwise than it is given."""
        if self.alone != "unpadded":
            return self.alone == "twice"
        samples = (sample_of(batch, i) for i in range(batch_size(batch)))
        labels = not self.loss.labels_to_model
        return any(unpadded(sample, leading=True, labels=labels) is not sample for sample in samples)

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

    def each_gradient(
        self,
        batch: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        take: Callable[[str, Tensor | None], None],
        index: int | None = None,
    ) -> None:
        """Hand each of the gradients that `gradients` returns to `take`, and hold one at a time where that is possible.

        A parameter that gets its gradient in several parts (reentrant checkpoints) is handed over once more in the end,
        as a whole; so is everything where weights are offloaded or sharded.
        """
        at_once = {n: t for n, t in tensors.items() if t.is_meta or isinstance(t, DTensor)}
        seen: dict[str, int] = {}

        def hand_over(name: str, tensor: Tensor) -> None:
            grad, tensor.grad = tensor.grad, None
            seen[name] = seen.get(name, 0) + 1
            if grad is not None and seen[name] == 1:
                take(name, (grad.to_dense() if grad.is_sparse else grad).reshape(-1))

        if not at_once:
            with self._requiring(tensors.values()), _without_gradients(tensors.values()):
                hooks = [
                    tensor.register_post_accumulate_grad_hook(lambda tensor, name=name: hand_over(name, tensor))
                    for name, tensor in tensors.items()
                ]
                try:
                    loss = _chosen(self.loss(self.model, batch), index, None)
                    if loss.requires_grad:
                        loss.backward()
                finally:
                    for hook in hooks:
                        hook.remove()
        again = tensors if at_once else {name: tensors[name] for name, count in seen.items() if count > 1}
        grads = self.gradients(batch, again, index)[1] if again else {}
        for name in tensors:
            if name in grads or name not in seen:
                take(name, grads.get(name))

    def loss_alone(self, sample: Mapping[str, Any]) -> float:
        """Return the loss of a batch of one, taken alone as the probe found right."""
        return self._loss(*self.sample(sample, 0))

    def loss_twice(self, sample: Mapping[str, Any]) -> float:
        """Return the loss of a batch of one that is evaluated twice in one batch."""
        return self._loss(copies(sample, 2), 0)

    def _loss(self, batch: Mapping[str, Any], index: int | None) -> float:
        with self.capture.suspended(), torch.no_grad():
            self.kept.forget()
            return float(self.loss(self.model, batch)[index or 0])

    def saved_dtypes(self, batch: Mapping[str, Any], tensors: Iterable[Tensor]) -> set[torch.dtype]:
        """Return the dtypes of what a forward pass saves for the backward pass."""
        seen: set[torch.dtype] = set()

        def pack(tensor: Tensor) -> Tensor:
            seen.add(tensor.dtype)
            return tensor

        here = [tensor for tensor in tensors if not tensor.is_meta]
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        # A forward that differentiates by itself (torch.func) refuses such hooks.
        with contextlib.suppress(RuntimeError), self._requiring(here), hooks:
            self.loss(self.model, batch)
        return seen

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
            sample, index = self.sample(batch, i)
            loss, grads = self.gradients(sample, tensors, index)
            for name, grad in grads.items():
                if grad is None:
                    out[name][i].zero_()
                elif projected and name in projected:
                    row = grad.to(device=out[name].device, dtype=out[name].dtype)
                    out[name][i].copy_(projected[name].project(row)[0])
                else:
                    out[name][i].copy_(grad)
            losses.append(loss.reshape(()))
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
            self.kept.forget()
            yield
        reshard(self.model)


def copies(sample: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a batch of so many copies of one sample."""
    return {k: torch.cat([v] * count) if isinstance(v, Tensor) and v.dim() else v for k, v in sample.items()}


def _chosen(losses: Tensor, index: int | None, weights: Tensor | None) -> Tensor:
    if index is not None:
        return losses[index]
    return losses.sum() if weights is None else (losses * weights.to(losses)).sum()


def gradients_of(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of leaves by `backward`, because reentrant checkpointing refuses `torch.autograd.grad`."""
    with _without_gradients(tensors):
        if loss.requires_grad:
            loss.backward()
        grads = [tensor.grad for tensor in tensors]
        return [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in grads]


@contextlib.contextmanager
def _without_gradients(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let leaves have no `.grad` inside, and the one they had afterwards."""
    tensors = list(tensors)
    before = [tensor.grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.grad = None
        yield
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
