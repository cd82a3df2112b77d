"""Replaying a segment on one batch: losses whose gradient is what the segment's parameters get from above.

For a layer `y = f(x)` with the gradient `dy` of its output, the loss of sample i is `<y_i, dy_i>`: its gradient with
respect to the layer's parameters and to `x_i` is that of the whole model's loss, to the bit, because `dy` is multiplied
by one. So the capture, the probe and the guard serve a segment as they serve a model, from the segment's inputs and
output gradients alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from streamfisher.errors import StreamError
from streamfisher.models.calling import batch_size
from streamfisher.models.losses import PerSampleLoss
from streamfisher.stream.segments import Segment, Stack
from streamfisher.stream.shell import Shell
from streamfisher.stream.trace import Key, same_value


class Stopped(BaseException):
    """The shell has come to the call at which it was to stop; no layer's own code can mistake it for an error."""


@dataclass
class Boundary:
    """What a replay of one batch needs beside the batch: values, gradients and structures."""

    values: Mapping[Key, Any]
    grads: Mapping[Key, Tensor] = field(default_factory=dict)  # of outputs, and of inputs as far as they are known
    placeholders: Mapping[Key, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)  # values not needed


class Leaves:
    """The tensors with which a replay starts, and the gradients that arrive at them."""

    def __init__(self, n_samples: int, carrying: set[Key], armed: bool, *, copied: bool = False) -> None:
        self.n_samples, self.carrying, self.armed = n_samples, carrying, armed
        self.copied = copied  # whether code that may write into them comes next
        self.leaves: dict[Key, Tensor] = {}
        self.aliases: dict[Key, Tensor] = {}

    def open(self, key: Key, value: Any) -> Any:
        """Return what stands for `value` in the replay."""
        if key not in self.carrying or not isinstance(value, Tensor) or not self.armed:
            return value
        # A tensor that all samples share gets a gradient of each of them.
        leaf = value if value.shape[0] == self.n_samples else value.expand(self.n_samples, *value.shape[1:])
        leaf = leaf.detach().requires_grad_()
        self.leaves[key] = leaf
        self.aliases[key] = leaf.clone() if self.copied else leaf.view_as(leaf)
        return self.aliases[key]

    def gradients(self) -> dict[Key, Tensor]:
        """Return what arrived."""
        return {key: leaf.grad for key, leaf in self.leaves.items() if leaf.grad is not None}


def inner_product(y: Tensor, dy: Tensor, offset: bool) -> Tensor:
    """Return `<y_i, dy_i>` of each sample, (B,).

    Args:
        y: (B, ...) or (1, ...).
        dy: (B, ...).
        offset: add `sum |y_i dy_i|` as a constant, so that rounding is small beside the result.
    """
    product = y * dy
    dtype = torch.promote_types(product.dtype, torch.float32)
    result = product.flatten(1).sum(1, dtype=dtype)
    return result + product.detach().abs().flatten(1).sum(1, dtype=dtype) if offset else result


@dataclass
class Replay:
    """What one evaluation of a replay's loss leaves behind."""

    leaves: Leaves
    losses: Tensor | None = None  # the run's own, where the replay went through the head
    fresh: dict[Key, Any] = field(default_factory=dict)  # what the shell's code made on its way


def span_loss(
    layers: Mapping[str, nn.Module], stack: Stack, segment: Segment, *, armed: bool, offset: bool = False
) -> tuple[Callable[[nn.Module, Mapping[str, Any]], Tensor], list[Replay]]:
    """Return the loss of a segment of layers as `(module, batch) -> (B,)`, and where it notes its evaluations.

    Args:
        layers: the modules by name.
        stack: the model.
        segment: of layers.
        armed: whether the first evaluation collects the gradients of the inputs.
        offset: see `inner_product`.
    """
    trace = stack.trace
    notes: list[Replay] = []

    def loss(_module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        n_samples = batch_size(batch)
        leaves = Leaves(n_samples, trace.carrying, armed and not notes)
        notes.append(Replay(leaves))
        values = {key: leaves.open(key, _value(batch, key)) for key in segment.inputs}
        for k in segment.calls:
            call = trace.calls[k]
            args, kwargs = pytree.tree_unflatten([values[key] for key in call.sources], call.spec)
            returned = pytree.tree_leaves(layers[call.module](*args, **kwargs))
            for key, leaf in zip(call.outputs, returned, strict=True):
                values.setdefault(key, leaf)
        terms = [inner_product(values[key], batch[grad_name(key)], offset) for key in segment.outputs]
        # Last, so that autograd takes it first: what came from above is added up in the order of the whole model.
        for key, alias in leaves.aliases.items():
            if grad_name(key) in batch:
                terms.append(inner_product(alias, batch[grad_name(key)], offset))
        return _sum(terms, n_samples)

    return loss, notes


def shell_loss(
    shell: Shell,
    stack: Stack,
    original: PerSampleLoss,
    *,
    through: bool,
    terms: Sequence[int] = (),
    armed: bool = False,
    offset: bool = False,
) -> tuple[Callable[[nn.Module, Mapping[str, Any]], Tensor], list[Replay]]:
    """Return the loss of the code around the layers as `(model, batch) -> (B,)`, and where it notes its evaluations.

    It is the run's own loss, if the shell is run through, and `<x, dx>` of what the layers get from this code.

    Args:
        shell: entered.
        stack: the model.
        original: the run's loss.
        through: run the code after the last layer; otherwise stop at the highest call of `terms`.
        terms: calls whose fresh arguments count.
        armed: whether the first evaluation collects the gradients of the layers' outputs.
        offset: see `inner_product`.
    """
    notes: list[Replay] = []

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        own = {key: value for key, value in batch.items() if not key.startswith(_PREFIX)}
        n_samples = batch_size(own)
        run = _ShellRun(stack, batch, Leaves(n_samples, stack.trace.carrying, armed and not notes, copied=True))
        run.stop = None if through else max(terms)
        losses: Tensor | None = None
        products: list[Tensor] = []
        with shell.handled_by(run.called):
            try:
                losses = original(model, own)
                if run.n_called != stack.n_calls:
                    raise StreamError(_other_path(run.n_called, "the layers are called fewer times"))
                products.append(losses)
            except Stopped:
                pass
        for k in terms:
            for key in stack.trace.fresh(k):
                if grad_name(key) in batch and key in stack.trace.carrying:
                    products.append(inner_product(run.fresh[key], batch[grad_name(key)], offset))
        # Without its graph, which would keep alive whatever a backward pass fills: rows of a head are gigabytes.
        fresh = {key: leaf.detach() if isinstance(leaf, Tensor) else leaf for key, leaf in run.fresh.items()}
        notes.append(Replay(run.leaves, None if losses is None else losses.detach(), fresh))
        return _sum(products, n_samples)

    return loss, notes


class _ShellRun:
    """One forward of the shell: every call of a layer gives what is recorded."""

    def __init__(self, stack: Stack, batch: Mapping[str, Any], leaves: Leaves) -> None:
        self.stack, self.batch, self.leaves = stack, batch, leaves
        self.fresh: dict[Key, Any] = {}  # what the shell's code made
        self.seen: dict[Key, Any] = {}
        self.read = set().union(*stack.reads.values())
        self.n_called = 0
        self.stop: int | None = None

    def called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        k, trace = self.n_called, self.stack.trace
        if k >= len(trace.calls) or trace.calls[k].module != name:
            raise StreamError(_other_path(k, f"layer {name} is called"))
        call = trace.calls[k]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != call.spec:
            raise StreamError(_other_path(k, f"layer {name} gets other arguments"))
        for key, leaf in zip(call.sources, leaves, strict=True):
            if key not in self.seen:
                self.seen[key] = self.fresh[key] = leaf
            elif not (self.seen[key] is leaf or (not isinstance(leaf, Tensor) and same_value(self.seen[key], leaf))):
                raise StreamError(_other_path(k, f"an argument of layer {name} is another than it was"))
        if self.stop == k:
            raise Stopped
        self.n_called += 1
        return pytree.tree_unflatten([self._output(key) for key in call.outputs], call.out_spec)

    def _output(self, key: Key) -> Any:
        if key not in self.seen:
            value = _value(self.batch, key)
            if isinstance(value, _Placeholder):
                value = value.tensor(self.leaves.n_samples)
            opened = self.leaves.open(key, value) if key in self.read else value
            self.seen[key] = opened.clone() if opened is value and isinstance(value, Tensor) else opened
        return self.seen[key]


def _other_path(k: int, what: str) -> str:
    return (
        f"a batch takes another way through the model than the traced one: at call {k}, {what}. Such a model cannot be "
        "streamed layer by layer; use --stream none."
    )


@dataclass(frozen=True)
class _Placeholder:
    """Stands for a layer's output that the code around the layers does not read: zeros of its shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool
    device: torch.device

    def tensor(self, n_samples: int) -> Tensor:
        shape = (n_samples, *self.shape[1:]) if self.batched else self.shape
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(shape)


_PREFIX = "stream:"


def value_name(key: Key) -> str:
    """Return the name of a value in a replay's batch."""
    return f"{_PREFIX}{key[0]}.{key[1]}.{key[2]}"


def grad_name(key: Key) -> str:
    """Return the name of a value's gradient in a replay's batch."""
    return f"{_PREFIX}grad.{key[0]}.{key[1]}.{key[2]}"


def _value(batch: Mapping[str, Any], key: Key) -> Any:
    value = batch[value_name(key)]
    return value.value if isinstance(value, Shared) else value


@dataclass(frozen=True)
class Shared:
    """A value that has no sample axis, or is no tensor: it is the same for a sample alone."""

    value: Any


def replay_batch(
    stack: Stack,
    keys: Sequence[Key],
    boundary: Boundary,
    n_samples: int,
    device: torch.device,
    own: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the batch for `span_loss` or `shell_loss`.

    Args:
        stack: the model.
        keys: the values that are needed.
        boundary: holds them.
        n_samples: B.
        device: where to.
        own: the run's batch, for the shell.
    """
    batch: dict[str, Any] = dict(own) if own is not None else {f"{_PREFIX}samples": torch.arange(n_samples)}
    for key in keys:
        if key not in boundary.values:
            shape, dtype = boundary.placeholders[key]
            batch[value_name(key)] = Shared(_Placeholder(shape, dtype, key in stack.trace.batched, device))
            continue
        value = boundary.values[key]
        if isinstance(value, Tensor):
            value = value.to(device)
            if key in stack.trace.batched and value.shape[0] != n_samples:
                raise StreamError(_other_path(key[1], f"a tensor of shape {tuple(value.shape)} has another batch axis"))
        batch[value_name(key)] = value if _has_samples(stack, key, value, n_samples) else Shared(value)
    for key, grad in boundary.grads.items():
        batch[grad_name(key)] = grad.to(device)
    return batch


def _has_samples(stack: Stack, key: Key, value: Any, n_samples: int) -> bool:
    if not isinstance(value, Tensor) or not value.dim() or key in stack.trace.fixed:
        return False
    return value.shape[0] == n_samples or key in stack.trace.carrying


def _sum(terms: Sequence[Tensor], n_samples: int) -> Tensor:
    if not terms:
        return torch.zeros(n_samples)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
