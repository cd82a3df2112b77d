"""How many bytes a backward pass takes for each token, measured on one batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

#: Beside what autograd saves, forward and backward hold temporary tensors of about half its size.
TEMPORARY = 1.5


class SavedBytes:
    """Counts what autograd saves for the backward pass, each storage once, parameters and buffers left out."""

    def __init__(self, model: nn.Module):
        kept = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in kept if _has_storage(tensor)}
        self.host = 0  # bytes in host memory

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside."""

        def pack(tensor: Tensor) -> Tensor:
            if _has_storage(tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self._known.add(storage.data_ptr())
                    self.host += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    @property
    def peak(self) -> float:
        """Return an estimate of the most bytes that the pass takes in host memory at one time."""
        return TEMPORARY * self.host


def _has_storage(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
