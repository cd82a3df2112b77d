"""A wave's Grams from the gradients that each of several ranks holds of its own samples.

Ranks share the columns (`shares.py`). In each turn every rank gets from the others its columns of all
samples and multiplies them; the sums of a Gram that several ranks have columns of go to the one that has its first
columns, which adds them in the order of the columns, as one rank would: the same bits however many there are. A Gram
that one rank has all columns of is made there as by one rank, its sums added up as they come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from streamfisher.collection.shares import HeldParameter, Piece, columns_of, pieces_of, turns_of
from streamfisher.config import SpectralConfig
from streamfisher.reduction.device_grams import build_device_folds
from streamfisher.reduction.gram import build_folds, finished, gram_settings
from streamfisher.reduction.moment import has_moment
from streamfisher.reduction.stored_grams import HeldGramSink, build_held_grams
from streamfisher.runtime.bars import Bar
from streamfisher.runtime.exchange import Parcel, exchange
from streamfisher.runtime.ranks import Ranks
from streamfisher.runtime.run_log import event
from streamfisher.sinks.device import DeviceGradients
from streamfisher.sinks.interface import GradientSource
from streamfisher.sinks.memory import MemorySink
from streamfisher.sinks.parcels import FactorUses
from streamfisher.store import RunStore

_HOST = torch.device("cpu")


def build_shared(
    store: RunStore,
    sink: MemorySink,
    valid: np.ndarray,
    config: SpectralConfig,
    keys: Sequence[str],
    ranks: Ranks,
    *,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Build Grams of gradients that several ranks hold, and write them to a run, with their moments.

    Args:
        store: of the run.
        sink: what this rank holds.
        valid: (N,) bool, which samples count.
        config: precision, workers and memory budget.
        keys: of the Grams.
        ranks: all of them.
        progress: show a bar.

    Returns:
        Gram key -> its diagonal, (N,) float64, on every rank.

    Raises:
        CorruptRunError: a gradient is not finite.
        CapacityError: the reduction does not fit the memory budget.
        RankError: another rank failed.
    """
    grams = _grams_of(store, sink, config, keys, ranks)
    turns = turns_of([piece for gram in grams.values() for piece in gram.pieces], ranks.count)
    ranks_of: dict[str, list[int]] = {key: [] for key in grams}  # those that have columns of a Gram
    for turn in turns:
        for rank, share in enumerate(turn):
            for key in {piece.key for piece in share}:
                ranks_of[key].append(rank)
    owners = {key: found[0] for key, found in ranks_of.items()}
    write = HeldGramSink(store, gram_settings(config), None, valid)  # a divided Gram has no moment
    if ranks.is_main:
        shared = sum(len(set(found)) > 1 for found in ranks_of.values())
        event("columns shared", stage="grams", ranks=ranks.count, turns=len(turns), grams=len(grams), shared=shared)
    sums: dict[str, np.ndarray] = {}  # of divided Grams of this rank, so far
    diagonals: dict[str, np.ndarray] = {}
    for turn in Bar(turns, desc="Grams", unit="turn", disable=not (progress and ranks.is_main)):
        parcels = [sink.part(columns_of(share)) for share in turn]
        arrived = exchange(ranks, parcels, sink.home, f"the gradients of {_names(turn)}")
        del parcels
        source = sink.joined(arrived, columns_of(turn[ranks.index]))
        whole = [piece.key for piece in turn[ranks.index] if len(grams[piece.key].pieces) == 1]
        if whole:
            diagonals |= build_held_grams(store, source, valid, config, whole)
        divided = [[piece for piece in share if len(grams[piece.key].pieces) > 1] for share in turn]
        products = _products(source, divided[ranks.index], config)
        del arrived, source
        with store.marking_together():
            for piece, fold in _at_their_owners(divided, products, owners, ranks):
                sums[piece.key] = sums[piece.key] + fold if piece.key in sums else fold
                if piece == grams[piece.key].pieces[-1]:
                    gram = finished(piece.key, sums.pop(piece.key), None, single=grams[piece.key].single)
                    diagonals |= [write(gram)]
        ranks.alive()
    told = Parcel({key: torch.from_numpy(diagonal) for key, diagonal in diagonals.items()})
    every = exchange(ranks, [told] * ranks.count, _HOST, "the norms of gradients")
    return {key: tensor.numpy() for parcel in every for key, tensor in parcel.tensors.items()}


@dataclass(frozen=True)
class _SharedGram:
    """How a Gram is made by ranks."""

    pieces: list[Piece]  # in the order in which they are added up
    single: bool  # float32 products are in it


def _grams_of(
    store: RunStore, sink: MemorySink, config: SpectralConfig, keys: Sequence[str], ranks: Ranks
) -> dict[str, _SharedGram]:
    """Return how each Gram is made, from what all ranks hold."""
    uses: dict[str, FactorUses] = {}
    for held in ranks.gather("uses of parameters", sink.uses()):
        for name, of_rank in held.items():
            uses[name] = uses.get(name, FactorUses()) + FactorUses(*of_rank)
    grams = {}
    for key in keys:
        parameters = [
            HeldParameter(
                name,
                sink.shape(name),
                sink.n_columns(name),
                sink.n_samples,
                sink.row_dtype,
                uses.get(name),
                sink.reduced_on,
            )
            for name in store.gram_members[key]
        ]
        parts = [part for held in parameters for part in held.parts(key, config)]
        pieces = pieces_of(parts, sink.n_samples, whole=has_moment(store, key))  # a moment is of whole rows
        grams[key] = _SharedGram(pieces, any(held.in_float32(config) for held in parameters))
    return grams


def _products(
    source: GradientSource | DeviceGradients, parts: Sequence[Piece], config: SpectralConfig
) -> list[np.ndarray]:
    """Return the sum of products of each part."""
    wanted = [(columns.name, columns.start, columns.stop) for part in parts for columns in part.columns]
    if isinstance(source, DeviceGradients):
        return build_device_folds(source, wanted, config)
    return [gram for folds in build_folds(source, wanted, config) for gram, _ in folds]


def _at_their_owners(
    turn: Sequence[Sequence[Piece]], products: Sequence[np.ndarray], owners: Mapping[str, int], ranks: Ranks
) -> list[tuple[Piece, np.ndarray]]:
    """Give each sum to the rank whose Gram it is part of, and return those of this rank, in their order."""
    if not any(turn):
        return []
    tensors: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks.count)]
    for place, (piece, fold) in enumerate(zip(turn[ranks.index], products, strict=True)):
        tensors[owners[piece.key]][str(place)] = torch.from_numpy(fold)
    arrived = exchange(ranks, [Parcel(some) for some in tensors], _HOST, f"the products of {_names(turn)}")
    return [
        (share[int(place)], fold.numpy())
        for share, parcel in zip(turn, arrived, strict=True)
        for place, fold in parcel.tensors.items()
    ]


def _names(turn: Sequence[Sequence[Piece]]) -> str:
    keys = list(dict.fromkeys(piece.key for share in turn for piece in share))
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
