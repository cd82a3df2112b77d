"""Tensors of a device that wait in host memory: copied there and back on a stream of their own, beside the work.

The memory is allocated once, pinned where a device copies, and used again. All copies are in the order of one stream,
so that a buffer which is given back can be taken at once. Without a device the same code copies in place, at once.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes that are allocated at a time, a power of two: what pins memory rounds up to one.
_CHUNK = 1 << 28


class HostBuffers:
    """Buffers of host memory by their size, rounded up by an eighth at most.

    Args:
        pinned: a device copies from and to them while the host goes on.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self.allocated = 0  # bytes
        self._free: dict[int, list[Tensor]] = {}

    def take(self, n_bytes: int) -> Tensor:
        """Return a buffer of at least so many bytes, (size,) uint8; what was in it is of no meaning."""
        size = _rounded(n_bytes)
        free = self._free.setdefault(size, [])
        if not free:
            chunk = torch.empty(max(_CHUNK if self.pinned else size, size), dtype=torch.uint8, pin_memory=self.pinned)
            self.allocated += chunk.nbytes
            free.extend(chunk[start : start + size] for start in range(0, chunk.nbytes - size + 1, size))
        return free.pop()

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._free[len(buffer)].append(buffer)


def _rounded(n_bytes: int) -> int:
    n_bytes = max(n_bytes, 1)
    step = max(1 << max(n_bytes.bit_length() - 4, 0), 512)
    return -(-n_bytes // step) * step


@dataclass(frozen=True)
class Parked:
    """A tensor in host memory."""

    buffer: Tensor
    tensor: Tensor  # a view of the buffer
    arrived: torch.cuda.Event | None  # when it is there


class HostCopies:
    """Moves tensors between a device and host memory.

    Args:
        device: whose; the CPU is one that copies at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers = HostBuffers(pinned=self.stream is not None)

    def park(self, value: Tensor) -> Parked:
        """Begin to copy a tensor to the host; it may be forgotten at once, but not written into."""
        buffer = self.buffers.take(value.nbytes)
        tensor = buffer[: value.nbytes].view(value.dtype).view(value.shape)
        with self._beside():
            tensor.copy_(value, non_blocking=True)
            if self.stream is None:
                return Parked(buffer, tensor, None)
            value.record_stream(self.stream)
            return Parked(buffer, tensor, self.stream.record_event())

    def fetch(self, parked: Parked) -> Tensor:
        """Begin to copy a tensor to the device; whoever uses it calls `arrive` first."""
        if self.stream is None:
            return parked.tensor.clone()
        with torch.cuda.stream(self.stream):
            return parked.tensor.to(self.device, non_blocking=True)

    def arrive(self, fetched: Tensor) -> Tensor:
        """Let the work that is submitted from now on wait for all copies that were begun, and return the tensor."""
        if self.stream is not None:
            work = torch.cuda.current_stream(self.device)
            work.wait_stream(self.stream)
            fetched.record_stream(work)
        return fetched

    def on_host(self, parked: Parked) -> Tensor:
        """Return a copy in host memory, once it is there."""
        if parked.arrived is not None:
            parked.arrived.synchronize()
        return parked.tensor.clone()

    def forget(self, parked: Parked) -> None:
        """Take the memory back."""
        self.buffers.give(parked.buffer)

    def _beside(self) -> contextlib.AbstractContextManager[object]:
        """Copy on the stream of the copies, after the work that was submitted so far."""
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)
