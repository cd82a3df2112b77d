"""Tensors that every rank gives to every other, as bytes: between hosts, and between devices where they are on some."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from streamfisher.errors import RankError, first_line
from streamfisher.runtime.ranks import Ranks

#: Bytes at whose multiples tensors begin in what is sent, so that any dtype can be viewed there.
_ALIGNED = 64


@dataclass(frozen=True)
class Parcel:
    """Tensors for one rank, and a word about them."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    note: Any = None  # plain JSON values


def exchange(ranks: Ranks, parcels: Sequence[Parcel], device: torch.device, what: str) -> list[Parcel]:
    """Give each rank its parcel and return those that it gave this one; all ranks call it together.

    Args:
        ranks: all of them.
        parcels: one for each rank, in their order; what a rank gives itself is handed back as it is.
        device: where tensors travel from and arrive, the host or an accelerator.
        what: is exchanged, for messages: "the gradients of ...".

    Raises:
        RankError: another rank failed or died.
    """
    ranks.wait(f"for {what}")
    if ranks.count == 1:
        return list(parcels)
    group = _group(device.type, ranks.timeout, dist.group.WORLD)
    headers = [_header(parcel) for parcel in parcels]
    mine = ranks.index
    with _naming(ranks, what):
        sizes = torch.tensor([[len(header), _size(parcel)] for header, parcel in zip(headers, parcels, strict=True)])
        every = [torch.empty_like(sizes, device=device) for _ in range(ranks.count)]
        dist.all_gather(every, sizes.to(device), group=group)
        others = [rank for rank in range(ranks.count) if rank != mine]
        coming = {rank: tuple(map(int, every[rank][mine].tolist())) for rank in others}
        arriving = {rank: torch.empty(sum(coming[rank]), dtype=torch.uint8, device=device) for rank in others}
        operations = []
        for rank in others:
            if coming[rank][1] or coming[rank][0]:
                operations.append(dist.P2POp(dist.irecv, arriving[rank], rank, group))
            operations.append(dist.P2POp(dist.isend, _flat(headers[rank], parcels[rank], device), rank, group))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return [parcels[mine] if rank == mine else _parcel(arriving[rank], coming[rank][0]) for rank in range(ranks.count)]


def _header(parcel: Parcel) -> bytes:
    """Return what the other side must know to take the tensors apart; its length is a multiple of `_ALIGNED`."""
    facts = [[key, str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in parcel.tensors.items()]
    text = json.dumps({"tensors": facts, "note": parcel.note}).encode()
    return text.ljust(_padded(len(text)))


def _size(parcel: Parcel) -> int:
    return sum(_padded(tensor.nbytes) for tensor in parcel.tensors.values())


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _flat(header: bytes, parcel: Parcel, device: torch.device) -> Tensor:
    """Return header and tensors as bytes."""
    flat = torch.empty(len(header) + _size(parcel), dtype=torch.uint8, device=device)
    flat[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(device)
    start = len(header)
    for tensor in parcel.tensors.values():
        flat[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
        start += _padded(tensor.nbytes)
    return flat


def _parcel(flat: Tensor, header: int) -> Parcel:
    """Return what came, its tensors as views of it."""
    facts = json.loads(bytes(flat[:header].cpu().numpy()))
    tensors, start = {}, header
    for key, dtype, shape in facts["tensors"]:
        kind = getattr(torch, dtype)
        size = int(torch.Size(shape).numel()) * kind.itemsize
        tensors[key] = flat[start : start + size].view(kind).view(shape)
        start += _padded(size)
    return Parcel(tensors, facts["note"])


@functools.cache
def _group(device: str, timeout: float, every: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """Return a group whose tensors may be on such a device; `None`: the one of `every` rank, which has it."""
    backend = "gloo" if device == "cpu" else dist.get_default_backend_for_device(device)
    if backend in str(dist.get_backend()):
        return None
    return dist.new_group(backend=backend, timeout=timedelta(seconds=timeout))


@contextmanager
def _naming(ranks: Ranks, what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        ranks.check()  # a rank that failed may have said why
        raise RankError(
            f"rank {ranks.index} lost another rank while {what} went from rank to rank ({first_line(error)[:200]}). "
            "What is finished is kept; the same command goes on from there."
        ) from error
