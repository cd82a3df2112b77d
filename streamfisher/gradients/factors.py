"""A gradient as two factors: `g_i = sum_t L_it^T R_it`, what autograd itself would multiply, instead of the product.

For a linear layer L are output gradients and R inputs; for an embedding L are one-hot rows, held as token ids. A
parameter that is used several times (tied weights, a layer that is called again) has one pair for each use, and its
gradient is the sum over all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Where samples fill a batch to all but this share of its positions, none is left out, and nothing need be copied.
_LITTLE = 1 / 32
#: Positions of the end of a batch, where the last one that counts is looked for first.
_END = 16
#: Entries of a factor, or of inner products, that are in float64 at a time.
_ENTRIES = 1 << 20


@dataclass(frozen=True)
class FactorPair:
    """One use of a parameter in a batch of B samples with T positions each."""

    left: Tensor  # (B, T, m), or (B, T) int64: ids v of rows that are 1 at v and 0 elsewhere
    right: Tensor  # (B, T, n)

    def __post_init__(self) -> None:
        if self.left.shape[:2] != self.right.shape[:2]:
            raise ValueError(f"factors of {tuple(self.left.shape)} and {tuple(self.right.shape)} do not pair")

    @property
    def by_index(self) -> bool:
        """Return whether the left factor holds ids."""
        return self.left.dim() == 2

    def of(self, where: int | list[int]) -> FactorPair:
        """Return the pair of one sample, or of some."""
        rows = slice(where, where + 1) if isinstance(where, int) else where
        return FactorPair(self.left[rows], self.right[rows])


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (m, n): what `L^T R` of a parameter of this shape is, before it is given the parameter's own axes."""
    return shape[0], int(torch.Size(shape[1:]).numel())


def product(pairs: Iterable[FactorPair], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return `sum_t L_it^T R_it`, the rows themselves: (B, *shape flattened), formed in `dtype`."""
    pairs = list(pairs)
    rows = torch.zeros(pairs[0].right.shape[0], *matrix_shape(shape), dtype=dtype, device=pairs[0].right.device)
    for pair in pairs:
        right = pair.right.to(dtype)
        if pair.by_index:
            for row, ids, values in zip(rows, pair.left, right, strict=True):
                row.index_add_(0, ids, values)
        else:
            rows.baddbmm_(pair.left.to(dtype).transpose(1, 2), right)
    return rows.flatten(1)


def total(pairs: Iterable[FactorPair], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the sum of all rows of a batch, flat `(P,)`, without forming them."""
    pairs = list(pairs)
    found = torch.zeros(*matrix_shape(shape), dtype=dtype, device=pairs[0].right.device)
    for pair in pairs:
        right = pair.right.flatten(0, 1).to(dtype)
        if pair.by_index:
            found.index_add_(0, pair.left.flatten(), right)
        else:
            found.addmm_(pair.left.flatten(0, 1).to(dtype).T, right)
    return found.flatten()


def squared_norms(pairs: Sequence[FactorPair]) -> Tensor:
    """Return `|g_i|^2 = sum_{t,s} (L_it . L_is)(R_it . R_is)` of each sample: (B,) float64.

    Over the positions, or by forming the product where that is fewer operations.
    """
    heights = [1 if pair.by_index else pair.left.shape[2] for pair in pairs]
    n_positions = sum(pair.right.shape[1] for pair in pairs)
    width = pairs[0].right.shape[2]
    height = max(heights)
    dense = not any(pair.by_index for pair in pairs)
    if dense and n_positions * (height + width) > 2 * height * width:
        rows = [product([pair.of(i) for pair in pairs], (height, width), _wide(pairs)) for i in _samples(pairs)]
        return torch.stack([torch.linalg.vecdot(row[0].double(), row[0].double()) for row in rows])
    squares = torch.zeros(pairs[0].right.shape[0], dtype=torch.float64, device=pairs[0].right.device)
    largest = max(side.shape[1] * max(side.shape[2:], default=0) for pair in pairs for side in (pair.left, pair.right))
    for some in torch.arange(len(squares)).split(max(1, _ENTRIES // max(largest, n_positions**2, 1))):
        part = slice(int(some[0]), int(some[-1]) + 1)
        lefts, rights = [pair.left[part] for pair in pairs], [pair.right[part] for pair in pairs]
        for a in range(len(pairs)):
            for b in range(a + 1):
                left, right = _inner(lefts[a], lefts[b]), _inner(rights[a], rights[b])
                squares[part] += torch.linalg.vecdot(left.flatten(1), right.flatten(1)) * (1.0 if a == b else 2.0)
    return squares


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Return the (B, T, S) inner products of two factors of some samples, float64, either of which may be ids."""
    if one.dim() == 2 and other.dim() == 2:
        return (one[:, :, None] == other[:, None, :]).double()
    if one.dim() == 2:
        return _inner(other, one).transpose(1, 2)
    if other.dim() == 2:
        return one.double().gather(2, other[:, None, :].expand(-1, one.shape[1], -1))
    wide = one.double()
    return wide @ (wide if other is one else other.double()).transpose(1, 2)


def _wide(pairs: Sequence[FactorPair]) -> torch.dtype:
    return torch.promote_types(pairs[0].right.dtype, torch.float32)


def _samples(pairs: Sequence[FactorPair]) -> range:
    return range(pairs[0].right.shape[0])


def bytes_of(factors: Mapping[str, Sequence[FactorPair]]) -> int:
    """Return the bytes of factors, a tensor that several pairs share counted once."""
    sides = {id(side): side.nbytes for uses in factors.values() for pair in uses for side in (pair.left, pair.right)}
    return sum(sides.values())


def on_host(factors: Mapping[str, Sequence[FactorPair]]) -> dict[str, list[FactorPair]]:
    """Return factors in host memory, a tensor that several pairs share copied once."""
    copies: dict[int, Tensor] = {}

    def take(side: Tensor) -> Tensor:
        return copies.setdefault(id(side), side.cpu())

    return {name: [FactorPair(take(pair.left), take(pair.right)) for pair in pairs] for name, pairs in factors.items()}


@dataclass(frozen=True)
class BatchFactors:
    """The factors of a batch as they are stored: each tensor once, without what contributes nothing at its end."""

    tensors: Mapping[str, Tensor]  # key -> (sum_i T_i, width), or (sum_i T_i,) ids
    lengths: Mapping[str, tuple[int, ...]]  # key -> T_i of each sample
    pairs: Mapping[str, tuple[tuple[str, str], ...]]  # parameter -> keys of L and R of each use


def pack(
    factors: Mapping[str, Sequence[FactorPair]], dropped: Sequence[int] = (), *, views: bool = False
) -> BatchFactors:
    """Return a batch's factors ready to be stored.

    Positions after the last one at which both factors of a pair are not zero contribute nothing and are left out, so
    padding costs nothing; unless they are so few that a copy without them would cost more. Tensors that several pairs
    share (the input of q, k and v) are taken once.

    Args:
        factors: parameter -> its pairs.
        dropped: places in the batch of samples that do not count.
        views: tensors that are whole, and as they were made, are not copied: see `is_as_made`.
    """
    keys: dict[tuple[object, ...], str] = {}
    sides: dict[str, Tensor] = {}
    pairs: dict[str, tuple[tuple[str, str], ...]] = {}
    for name, uses in factors.items():
        pairs[name] = tuple(
            (_key(keys, sides, pair.left, f"{name}~L{use}"), _key(keys, sides, pair.right, f"{name}~R{use}"))
            for use, pair in enumerate(uses)
        )
    lengths = _used_lengths(sides, [pair for uses in pairs.values() for pair in uses], set(dropped))
    tensors = {key: _joined(side, lengths[key], views=views) for key, side in sides.items()}
    return BatchFactors(tensors, lengths, pairs)


def is_as_made(side: Tensor) -> bool:
    """Return whether a tensor is as the operation left it that made it: nothing has been written into it since.

    A buffer that a model uses again and again is not; what it holds must be copied before the next batch.
    """
    return not side.is_inference() and side._version == 0


def _joined(side: Tensor, lengths: Sequence[int], *, views: bool) -> Tensor:
    """Return the positions that count of all samples, one after the other: a view where it may be and all do."""
    whole = views and all(length == side.shape[1] for length in lengths) and side.is_contiguous()
    if whole and is_as_made(side) and side.untyped_storage().nbytes() == side.nbytes:
        return side.detach().flatten(0, 1)
    return torch.cat([side[i, :length] for i, length in enumerate(lengths)])


def _key(keys: dict[tuple[object, ...], str], sides: dict[str, Tensor], side: Tensor, name: str) -> str:
    # All of them are alive, so the same memory seen in the same way is the same tensor.
    where = (side.data_ptr(), tuple(side.shape), side.stride(), side.dtype, side.device)
    key = keys.setdefault(where, name)
    sides.setdefault(key, side)
    return key


def _used_lengths(
    sides: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]], dropped: set[int]
) -> dict[str, tuple[int, ...]]:
    """Return how many positions of each sample count, the same for all tensors that are paired with one another."""
    own = _last_positions(sides)
    members = {key: key for key in sides}
    for left, right in pairs:
        members = {key: members[left] if member == members[right] else member for key, member in members.items()}
    needed: dict[str, list[int]] = {}
    for left, right in pairs:
        both = [min(pair) for pair in zip(own[left], own[right], strict=True)]
        before = needed.setdefault(members[left], both)
        needed[members[left]] = [max(pair) for pair in zip(before, both, strict=True)]
    for member, counted in needed.items():
        positions = sides[member].shape[1]
        if sum(counted) >= (1 - _LITTLE) * positions * len(counted):
            needed[member] = [positions] * len(counted)
    return {
        key: tuple(0 if i in dropped else length for i, length in enumerate(needed[member]))
        for key, member in members.items()
    }


def _last_positions(sides: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return for each sample of each tensor one past the last position that is not zero; all are waited for together.

    Most samples fill their batch, so the end of each tensor is looked at first.
    """
    ends = {key: side[:, -_END:] for key, side in sides.items()}
    found = {}
    for key, last in _together(ends).items():
        before = sides[key].shape[1] - ends[key].shape[1]
        if all(last) or not before:
            found[key] = [before + position for position in last]
    return found | _together({key: side for key, side in sides.items() if key not in found})


def _together(sides: Mapping[str, Tensor]) -> dict[str, list[int]]:
    found = torch.stack([_last_nonzero(side) for side in sides.values()]).tolist() if sides else []  # one wait for all
    return dict(zip(sides, found, strict=True))


def _last_nonzero(side: Tensor) -> Tensor:
    """Return for each sample one past the last position that is not zero: (B,) int64."""
    if side.dim() == 2 or not side.shape[1]:
        return torch.full((side.shape[0],), side.shape[1], device=side.device)
    if side.shape[2] == 0:
        return torch.zeros(side.shape[0], dtype=torch.int64, device=side.device)
    found = side.abs().amax(dim=2) != 0  # eight times as fast as `(side != 0).any(dim=2)`
    positions = torch.arange(1, side.shape[1] + 1, device=side.device)
    return (found * positions).amax(dim=1)
