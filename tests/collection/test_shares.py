"""Ranks share the columns of a wave evenly, in their order, none with more bytes than the largest Gram has."""

import itertools

import pytest
import torch

from streamfisher import SpectralConfig
from streamfisher.collection import shares
from streamfisher.reduction import kernels


def pieces(*sizes, beside=0):
    """One Gram for each list of sizes, in bytes, of its pieces."""
    found = []
    for number, of_gram in enumerate(sizes):
        starts = itertools.accumulate(of_gram, initial=0)
        for start, size in zip(starts, of_gram, strict=False):
            columns = shares.Columns(f"p{number}", start, start + size, "rows")
            found.append(shares.Piece((columns,), f"p{number}", float(size), size, beside))
    return found


def loads(turns):
    return [[sum(piece.n_bytes for piece in share) for share in turn] for turn in turns]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_one_large_gram_is_shared_evenly_in_one_turn(ranks):
    found = loads(shares.turns_of(pieces([1] * 64), ranks))
    assert len(found) == 1 and sum(found[0]) == 64
    assert max(found[0]) - min(found[0]) <= 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_no_rank_gets_more_at_a_time_than_the_largest_gram(ranks):
    every = pieces([2] * 9, [5], [1] * 4, [18], [3, 3, 3], *([7],) * 20)
    turns = shares.turns_of(every, ranks)
    assert [piece for turn in turns for share in turn for piece in share] == every
    assert max(map(max, loads(turns))) <= 18
    assert {len(turn) for turn in turns} == {ranks}
    assert sum(map(sum, loads(turns))) == sum(piece.n_bytes for piece in every)


def test_what_comes_beside_counts_once_for_each_parameter():
    turns = shares.turns_of(pieces([1] * 8, [1] * 8, beside=4), 2)
    assert loads(turns) == [[8, 8]]


def test_a_gram_of_one_piece_that_is_most_of_the_work_leaves_the_others_to_the_other_ranks():
    (turn,) = shares.turns_of(pieces([100], *([1],) * 10), 3)
    assert len(turn[0]) == 1


def test_nothing_to_do_is_one_turn_without_pieces():
    assert shares.turns_of([], 3) == [[[], [], []]]


def test_pieces_of_one_parameter_that_follow_one_another_come_as_one():
    assert shares.columns_of(pieces([4, 4, 4], [2])) == [
        shares.Columns("p0", 0, 12, "rows"),
        shares.Columns("p1", 0, 2, "rows"),
    ]


def parameter(shape, uses, **options):
    columns = shape[0] * shape[1]
    return shares.HeldParameter(
        "w", shape, columns, 16, torch.float32, shares.FactorUses(*uses) if uses else None, **options
    )


@pytest.mark.parametrize(
    ("shape", "uses", "options", "cut", "last"),
    [
        ((4096, 512), None, {}, "rows", 4096 * 512),
        ((4096, 512), (2048, 0, 1, 4096, 512), {}, "left", 4096),
        ((512, 4096), (2048, 0, 1, 512, 4096), {}, "right", 4096),
        ((9000, 512), (2048, 1, 1, 8, 512), {}, "right", 512),
        ((9000, 4096), (2048, 0, 1, 4, 4), {"device": torch.device("cpu")}, "left", 9000),
    ],
    ids=["rows", "tall", "wide", "embedding", "device"],
)
def test_the_longer_factor_is_cut_and_all_columns_are_in_some_piece(shape, uses, options, cut, last, monkeypatch):
    monkeypatch.setattr(kernels, "token_columns", lambda positions: 128)
    found = parameter(shape, uses, **options).parts("key", SpectralConfig())
    assert len(found) > 1 and {piece.columns[0].cut for piece in found} == {cut}
    assert found[0].columns[0].start == 0 and found[-1].columns[0].stop == last
    assert all(one.columns[0].stop == other.columns[0].start for one, other in itertools.pairwise(found))


def test_what_must_stay_whole_is_one_piece_and_nothing_of_it_is_cut():
    parts = parameter((4096, 512), None).parts("key", SpectralConfig())
    (piece,) = shares.pieces_of(parts, 16, whole=True)
    assert piece.columns == (shares.Columns("w", 0, 4096 * 512, None),) and piece.n_bytes == 16 * 4096 * 512 * 4
    (piece,) = parameter((2048, 2048), (16, 0, 1, 9, 9)).parts("key", SpectralConfig())  # pairwise
    assert piece.columns[0].cut is None


def test_a_gram_is_divided_where_its_sums_are_small_beside_its_gradients():
    parts = pieces([100] * 4) + pieces([50] * 4, beside=10)  # 4 sums of 8 N^2 and 4 more
    assert shares.pieces_of(parts[:4], 3, whole=False) != parts[:4]  # 288 bytes beside 400
    assert shares.pieces_of(parts[:4], 1, whole=False) == parts[:4]  # 32
    (piece,) = shares.pieces_of(parts[4:], 2, whole=False)
    assert piece.n_bytes == 210 and piece.beside == 0 and piece.operations == 200
