"""What each rank multiplies of a wave: columns, evenly, in the order in which their products are added up.

A *piece* is a part of a parameter's columns, whose products are a sum of their own, or all columns of a Gram. Ranks
take pieces that follow one another, so that a large matrix is shared and a small one stays whole; in turns, so that no
rank gets more gradients from the others at a time than those of the largest Gram.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from streamfisher.config import SpectralConfig
from streamfisher.gradients.factors import matrix_shape
from streamfisher.reduction.device_grams import device_parts, product_dtype
from streamfisher.reduction.folds import dtype_of_products, ranges_of
from streamfisher.reduction.kernels import FLOAT64_COST, FactorUse, choose_kernel, kernel_operations, parts_of
from streamfisher.sinks.parcels import Columns, Cut, FactorUses

#: A Gram is divided where the sums of its parts, which meet at one rank, take at most this share of its gradients.
_SUMS_SHARE = 0.25


@dataclass(frozen=True)
class Piece:
    """What one rank multiplies: a part of a parameter, whose products are a sum of their own, or a whole Gram."""

    columns: tuple[Columns, ...]  # one, where it is a part
    key: str  # of the Gram that it is, or is part of
    operations: float
    n_bytes: int  # of these columns, of all samples
    beside: int = 0  # and of what is not cut, which comes once for all parts of a parameter


@dataclass(frozen=True)
class HeldParameter:
    """A parameter's gradients of all samples, as ranks hold them."""

    name: str
    shape: tuple[int, ...]
    columns: int  # of a row
    n_samples: int
    row_dtype: torch.dtype
    uses: FactorUses | None = None  # of all samples, where they are held as factors
    device: torch.device | None = None  # where they are reduced there

    def dtype_of_products(self, dtype_gram: torch.dtype) -> torch.dtype:
        """Return the dtype in which products of rows are formed."""
        if self.device is not None:
            return product_dtype(self.columns, dtype_gram, self.row_dtype, self.device)
        rows = np.dtype("float64" if self.row_dtype == torch.float64 else "float32")
        wide = dtype_of_products(self.columns, dtype_gram, rows) == np.float64
        return torch.float64 if wide else torch.float32

    def in_float32(self, config: SpectralConfig) -> bool:
        """Return whether products are formed in float32, see `streamfisher.reduction.gram.in_float32`."""
        if self.dtype_of_products(config.dtype_gram) == torch.float64:
            return False
        if self.uses is None or self.device is not None:
            return True
        return choose_kernel(self._use(self.uses), single=True) == "slabs"

    def parts(self, key: str, config: SpectralConfig) -> list[Piece]:
        """Return the parts of the columns, in the order in which their products are added up.

        Args:
            key: of the Gram that the parameter is part of.
            config: `dtype_gram` counts.
        """
        operations, parts, cut = self._work(config)
        uses = self.uses or FactorUses(right_bytes=self.n_samples * self.columns * self.row_dtype.itemsize)
        sides = {"rows": uses.right_bytes, "left": 0 if uses.by_index else uses.left_bytes, "right": uses.right_bytes}
        cut = cut if len(parts) > 1 else None
        divided = 0 if cut is None else sides[cut]
        beside = uses.left_bytes + uses.right_bytes - divided
        shares = [(stop - start) / max(parts[-1][1], 1) for start, stop in parts]
        return [
            Piece((Columns(self.name, *part, cut),), key, operations * share, int(divided * share), beside)
            for part, share in zip(parts, shares, strict=True)
        ]

    def _use(self, uses: FactorUses) -> FactorUse:
        return FactorUse(matrix_shape(self.shape), self.n_samples, uses.positions, uses.by_index, uses.uses)

    def _work(self, config: SpectralConfig) -> tuple[float, list[tuple[int, int]], Cut]:
        """Return about how many operations of float32 the products take, their parts, and what these cut."""
        single = self.dtype_of_products(config.dtype_gram) == torch.float32
        # What a device measures of itself may differ from rank to rank; who multiplies what must not.
        cost = 1.0 if single or self.device is not None else FLOAT64_COST
        if self.uses is None:
            of_rows = float(self.n_samples) ** 2 * self.columns
            ranges = ranges_of(self.columns) if self.device is None else device_parts(None, self.columns)
            return of_rows * cost, ranges, "rows"
        use = self._use(self.uses)
        slabs, pairwise = kernel_operations(use.positions, use.shape, self.n_samples)
        if self.device is not None:
            if use.by_token:  # only tokens that occur are formed
                slabs *= min(1.0, use.positions / max(use.shape[0], 1))
            return slabs * cost, device_parts(use.shape, self.columns), "left"
        kernel = choose_kernel(use, single=single)
        tokens = float(use.positions) * self.n_samples * use.shape[1]
        operations = {
            "slabs": slabs * cost,
            "pairwise": pairwise * FLOAT64_COST,
            "tokens": tokens * FLOAT64_COST,
        }
        cut: Cut = "left" if kernel == "slabs" and use.is_turned else "right"
        return operations[kernel], parts_of(kernel, use), cut


def pieces_of(parts: Sequence[Piece], n_samples: int, *, whole: bool) -> list[Piece]:
    """Return the parts of a Gram, or all of it as one piece where dividing it would take too much memory.

    Args:
        parts: of all its parameters.
        n_samples: N, of the sums.
        whole: it is never divided.
    """
    n_bytes = _bytes(parts)
    if not whole and len(parts) * 8 * n_samples**2 <= _SUMS_SHARE * n_bytes:
        return list(parts)
    columns = tuple(replace(some, cut=None) for some in columns_of(parts))
    return [Piece(columns, parts[0].key, sum(part.operations for part in parts), n_bytes)]


def turns_of(pieces: Sequence[Piece], ranks: int) -> list[list[list[Piece]]]:
    """Return, turn by turn, the pieces of each rank.

    Args:
        pieces: all of them, those of a Gram one after the other.
        ranks: how many there are.
    """
    by_gram = itertools.groupby(pieces, key=lambda piece: piece.key)
    most = max((_bytes(list(members)) for _, members in by_gram), default=0)
    for turns in itertools.count(1):
        shares = list(_shares(pieces, turns * ranks, most))
        if len(shares) <= turns * ranks:
            shares += [[]] * (turns * ranks - len(shares))
            return [shares[first : first + ranks] for first in range(0, len(shares), ranks)]
    raise AssertionError("one piece is no more than a Gram")


def _shares(pieces: Sequence[Piece], count: int, most: int) -> Iterator[list[Piece]]:
    """Yield about `count` shares of about as many operations, none of more than `most` bytes."""
    each = sum(piece.operations for piece in pieces) / count
    share: list[Piece] = []
    done, ended = 0.0, 0
    for piece in pieces:
        over = done + piece.operations / 2 > (ended + 1) * each
        if share and (over or _bytes([*share, piece]) > most):
            yield share
            share, ended = [], ended + 1
        share.append(piece)
        done += piece.operations
    if share:
        yield share


def _bytes(pieces: Iterable[Piece]) -> int:
    pieces = list(pieces)
    beside = {piece.columns[0].name: piece.beside for piece in pieces}
    return sum(piece.n_bytes for piece in pieces) + sum(beside.values())


def columns_of(pieces: Iterable[Piece]) -> list[Columns]:
    """Return the columns of pieces, those of one parameter, which follow one another, as one."""
    found: list[Columns] = []
    for columns in (columns for piece in pieces for columns in piece.columns):
        if found and found[-1].name == columns.name:
            found[-1] = replace(found[-1], stop=columns.stop)
        else:
            found.append(columns)
    return found
