"""Tensors of a device copied to the host behind its back: into pinned memory, on a stream of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HostCopy:
    """Tensors on the host, which are whole once `wait` has returned."""

    tensors: Mapping[str, Tensor]
    arrived: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Return when all has been copied."""
        if self.arrived is not None:
            self.arrived.synchronize()


class HostCopies:
    """Copies tensors of one device to the host; those that are there already are handed on as they are."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> HostCopy:
        """Begin to copy tensors, all on one device; they may be used otherwise, but not changed, before it is done."""
        device = next((values.device for values in tensors.values()), torch.device("cpu"))
        if device.type != "cuda":
            return HostCopy({name: values.cpu() for name, values in tensors.items()})
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        copies = {}
        with torch.cuda.stream(self._stream):
            for name, values in tensors.items():
                copies[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                copies[name].copy_(values, non_blocking=True)
                values.record_stream(self._stream)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return HostCopy(copies, arrived)
