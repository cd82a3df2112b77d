"""Boundary tensors of each batch: what segments hand on to each other, forward and backward.

In memory up to a budget, beyond it (or always, where they are to survive a kill) one file each, with a checksum. What
is missing or damaged is not an error here: whoever needs it makes it again from what is below.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Hashable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import torch
from torch import Tensor

from streamfisher.byte_sizes import format_bytes
from streamfisher.errors import CapacityError
from streamfisher.runtime.durable import replacing
from streamfisher.stream.host_copies import HostCopies, Parked

#: What `Boundaries.get` returns for what is not there.
MISSING = object()

#: Then come the CRC-32C of all that follows, the length of the head, the head (JSON), and the tensor's bytes.
_MAGIC = b"sfb2"

_PLAIN = (type(None), bool, int, float, str)


def boundary_spacing(room: int, each: int, n_segments: int) -> int:
    """Return k where only every k-th boundary between segments is kept, so that they fit; the others are made again.

    Args:
        room: bytes for all boundaries that are kept, and for one gradient on its way down.
        each: bytes of one boundary, of all samples.
        n_segments: how many segments there are.

    Raises:
        CapacityError: not even two fit: one that is kept and the gradient that goes down.
    """
    fits = room // max(each, 1) - 1
    if fits < 1:
        raise CapacityError(
            f"the hidden states at one boundary between layers take {format_bytes(each)} for all samples, with "
            f"their gradient {format_bytes(2 * each)}, and {format_bytes(room)} of the disk are for them. Give or "
            "free more disk, or take fewer samples."
        )
    return -(-n_segments // fits)


class Boundaries:
    """Tensors by batch and name. The text of a batch names its folder.

    Args:
        folder: for what does not fit the memory; made when it is needed. `None`: everything stays in memory.
        memory: bytes of tensors in memory; `None`: as much as there is.
        durable: write every tensor to the folder, so that another process finds it.
        copies: take tensors of a device to host memory and back; `None`: what is in memory stays where it was made.
    """

    def __init__(
        self,
        folder: Path | None = None,
        memory: int | None = None,
        *,
        durable: bool = False,
        copies: HostCopies | None = None,
    ) -> None:
        self.folder, self.memory, self.durable, self.copies = folder, memory, durable, copies
        self._coming: dict[tuple[Hashable, str], Tensor] = {}  # on their way to the device
        self.bytes_in_memory = 0
        self.bytes_written = 0
        self.n_damaged = 0  # files that were found damaged, and removed
        self._held: dict[Hashable, dict[str, Any]] = {}
        self._shapes: dict[tuple[Hashable, str], tuple[tuple[int, ...], torch.dtype]] = {}

    def put(self, batch: Hashable, name: str, value: Any) -> None:
        """Keep a tensor, or anything else (in memory), in place of what had that name."""
        self.drop(batch, name)
        if not isinstance(value, Tensor):
            self._held.setdefault(batch, {})[name] = value
            if self.durable and isinstance(value, _PLAIN):
                self._write(self._file(batch, name), {"value": value}, b"")
            return
        value = value.detach()
        self.note_shape(batch, name, value)
        fits = self.memory is None or self.bytes_in_memory + value.nbytes <= self.memory
        if not self.durable and fits:
            self._held.setdefault(batch, {})[name] = self._kept(value)
            self.bytes_in_memory += value.nbytes
        elif self.folder is None:
            raise CapacityError(
                f"the boundaries between layers need more than {format_bytes(self.memory or 0)} of memory, and there "
                "is no folder to put them in. Give a larger --memory-budget."
            )
        else:
            flat = value.cpu().contiguous()
            data = bytes(flat.reshape(-1).view(torch.uint8).numpy().data) if flat.numel() else b""
            head = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            self._write(self._file(batch, name), head, data)

    def _kept(self, value: Tensor) -> Tensor | Parked:
        if self.copies is not None and value.device == self.copies.device:
            return self.copies.park(value)
        # A view would keep all of its base alive, and what was expanded is stored once.
        return value if value.untyped_storage().nbytes() <= value.nbytes else value.clone()

    def prefetch(self, batch: Hashable, names: Iterable[str]) -> None:
        """Begin to take to the device what of these is in host memory, for a batch that comes next."""
        for name in names:
            parked = self._held.get(batch, {}).get(name)
            if self.copies is not None and isinstance(parked, Parked) and (batch, name) not in self._coming:
                self._coming[batch, name] = self.copies.fetch(parked)

    def get(self, batch: Hashable, name: str, device: torch.device | None = None) -> Any:
        """Return what was kept, or `MISSING`, also where its file is damaged."""
        held = self._held.get(batch, {})
        if name in held:
            value = held[name]
        else:
            value = self._read(batch, name)
        if isinstance(value, Parked):
            assert self.copies is not None  # who else parks
            if device != self.copies.device:
                value = self.copies.on_host(value)
            else:
                coming = self._coming.pop((batch, name), None)
                value = self.copies.arrive(self.copies.fetch(value) if coming is None else coming)
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    def has(self, batch: Hashable, name: str) -> bool:
        """Return whether something of this name is kept (whether it is intact shows when it is read)."""
        return name in self._held.get(batch, {}) or (self.folder is not None and self._file(batch, name).is_file())

    def drop(self, batch: Hashable, name: str) -> None:
        """Forget a name, if it is there."""
        value = self._held.get(batch, {}).pop(name, None)
        self._coming.pop((batch, name), None)
        if isinstance(value, Parked):
            assert self.copies is not None
            self.copies.forget(value)
            value = value.tensor
        if isinstance(value, Tensor):
            self.bytes_in_memory -= value.nbytes
        if self.folder is not None:
            self._file(batch, name).unlink(missing_ok=True)

    def keep_only(self, batch: Hashable, names: Collection[str]) -> None:
        """Forget everything else of a batch."""
        for name in [name for name in self._held.get(batch, {}) if name not in names]:
            self.drop(batch, name)
        if self.folder is not None and self._folder(batch).is_dir():
            files = {self._file(batch, name) for name in names}
            for file in self._folder(batch).iterdir():
                if file not in files:
                    file.unlink(missing_ok=True)

    def note_shape(self, batch: Hashable, name: str, value: Tensor) -> None:
        """Remember the shape of a tensor that need not be kept itself."""
        self._shapes[batch, name] = tuple(value.shape), value.dtype

    def shape(self, batch: Hashable, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Return shape and dtype of a tensor that was seen in this process, or kept."""
        return self._shapes.get((batch, name))

    def clear(self) -> None:
        """Forget everything, files included."""
        self._held, self._shapes, self._coming, self.bytes_in_memory = {}, {}, {}, 0
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _folder(self, batch: Hashable) -> Path:
        assert self.folder is not None
        return self.folder / f"batch-{batch}"

    def _file(self, batch: Hashable, name: str) -> Path:
        return self._folder(batch) / f"{name.replace(':', '_')}.bin"

    def _write(self, file: Path, head: dict[str, Any], data: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(head).encode()
        text = len(text).to_bytes(4, "little") + text
        checksum = google_crc32c.extend(google_crc32c.value(text), data)
        with replacing(file) as partial, partial.open("wb") as stream:
            stream.write(_MAGIC + checksum.to_bytes(4, "little") + text)
            stream.write(data)
        self.bytes_written += len(data)

    def _read(self, batch: Hashable, name: str) -> Any:
        if self.folder is None:
            return MISSING
        file = self._file(batch, name)
        try:
            with file.open("rb") as stream:
                value = _parsed(stream)
        except FileNotFoundError:
            return MISSING
        if value is MISSING:
            self.n_damaged += 1
            file.unlink(missing_ok=True)
        elif isinstance(value, Tensor):
            self.note_shape(batch, name, value)
        return value


def _parsed(stream: BinaryIO) -> Any:
    """Return what a file holds; `MISSING` where it is damaged."""
    front, body = stream.read(8), stream.read()
    if front != _MAGIC + google_crc32c.value(body).to_bytes(4, "little"):
        return MISSING
    size = 4 + int.from_bytes(body[:4], "little")
    head = json.loads(body[4:size])
    if "value" in head:
        return head["value"]
    dtype = getattr(torch, head["dtype"])
    if len(body) == size:
        return torch.empty(head["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(memoryview(body)[size:]), dtype=dtype).reshape(head["shape"])
