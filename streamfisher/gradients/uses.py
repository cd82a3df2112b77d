"""Uses of parameters that no rule accounts for, seen in the very pass that forms the rows.

A rule knows what its module does with a parameter, and nothing of what other code does with it: of a weight that is
used a second time for some samples only, or of one that the probe never saw used. So while a batch is captured its
parameters require grad, except inside the modules whose rules serve them. What autograd then accumulates in a parameter
is the gradient that the rules left out; where nothing uses it so, nothing is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class UseWatch:
    """Watches the parameters of one captured pass.

    Args:
        tensors: the parameters of the pass, frozen. Those whose values are elsewhere (offloaded, sharded) are other
            tensors while they are used, and are not watched.
        unproved: parameters whose rule no sample has proved; they are watched inside its modules too.
    """

    def __init__(self, tensors: Mapping[str, Tensor], unproved: Collection[str] = ()) -> None:
        self.tensors = {n: t for n, t in tensors.items() if not t.is_meta and not isinstance(t, DTensor)}
        self._depth = {name: 0 for name in self.tensors if name not in unproved}  # calls of serving modules under way
        self.grads: dict[str, Tensor] = {}  # what was left out: gradients summed over the batch

    def enter(self, names: Iterable[str]) -> None:
        """A module that serves these parameters starts."""
        for name in names:
            depth = self._depth.get(name)
            if depth is not None:
                self._depth[name] = depth + 1
                if not depth:
                    self.tensors[name].requires_grad_(False)

    def leave(self, names: Iterable[str]) -> None:
        """It has returned."""
        for name in names:
            depth = self._depth.get(name)
            if depth:
                self._depth[name] = depth - 1
                if depth == 1:
                    self.tensors[name].requires_grad_(True)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Let the parameters require grad; afterwards they are frozen, and `grads` holds what came."""
        before = {name: tensor.grad for name, tensor in self.tensors.items()}
        try:
            for tensor in self.tensors.values():
                tensor.grad = None
                tensor.requires_grad_(True)
            yield
            for name, tensor in self.tensors.items():
                if tensor.grad is not None:
                    self.grads[name] = tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad
        finally:
            for name, tensor in self.tensors.items():
                tensor.requires_grad_(False)
                tensor.grad = before[name]


def nonzero(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names of those that are not zero throughout (NaN is not zero); one wait for the device."""
    if not tensors:
        return set()
    device = next(iter(tensors.values())).device
    flags = torch.stack([tensor.any().to(device) for tensor in tensors.values()]).tolist()
    return {name for name, flag in zip(tensors, flags, strict=True) if flag}
