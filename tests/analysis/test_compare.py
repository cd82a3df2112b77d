"""Runs against each other: principal angles against dense ones, and what cannot be compared."""

import json

import numpy as np
import pytest
import tiny_models
from command_line import cli
from tiny_runs import PATTERNS, make_run, rows

import streamfisher as sf
from streamfisher import compare
from streamfisher.errors import ConfigError, RunError


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return make_run(folder / "a.zarr"), make_run(folder / "b.zarr", seed=1, store_centered=True)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "foreign.zarr"
    return sf.collect(tiny_models.causal(), tiny_models.sequences(), path)


def leading(G, k, center):
    G = G - G.mean(axis=0) if center else G
    return np.linalg.svd(G, full_matrices=False)[2][:k]


@pytest.mark.parametrize("center", [False, True])
def test_overlap_is_that_of_dense_eigenspaces(two, tmp_path, center):
    a, b = two
    plain_b = make_run(tmp_path / "b.zarr", seed=1)
    comparison = compare([a, b], PATTERNS, center, top=4)
    assert [overlap.block for overlap in comparison.overlaps] == ["first", "second"]
    for overlap in comparison.overlaps:
        names = [name for name in a.parameters if name.startswith(overlap.block)]
        V_a, V_b = leading(rows(a, names), 4, center), leading(rows(plain_b, names), 4, center)
        cosines = np.linalg.svd(V_a @ V_b.T, compute_uv=False)
        np.testing.assert_allclose(overlap.cosines, cosines, atol=1e-9)
        assert overlap.mean_squared_cosine == pytest.approx((cosines**2).mean())


def test_a_run_overlaps_with_itself_wholly(two, tmp_path):
    same = make_run(tmp_path / "same.zarr")
    (overlap,) = compare([two[0], same], "none", top=5).overlaps
    np.testing.assert_allclose(overlap.cosines, 1, atol=1e-12)


def test_metrics_and_intervals_side_by_side(two):
    comparison = compare(two, PATTERNS, bootstrap=10, top=0)
    found = comparison.to_dict()
    assert found["runs"] == ["a.zarr", "b.zarr"]
    expected = [run.spectrum(PATTERNS).blocks["first"].trace for run in two]
    assert found["blocks"]["first"]["trace"] == expected
    np.testing.assert_array_equal(comparison.trajectory("trace", "first"), expected)
    assert len(found["blocks"]["global"]["intervals"]) == 2
    assert found["overlaps"] == []
    json.dumps(found, allow_nan=False)


def test_what_makes_numbers_incomparable_is_said(two, tmp_path):
    fewer = make_run(tmp_path / "fewer.zarr", 16)
    notes = " ".join(compare([two[0], fewer], "none", top=0).warnings)
    assert "N differs" in notes
    assert "the data differ" in notes


def test_runs_that_share_nothing_are_refused(two, foreign):
    with pytest.raises(RunError, match="share nothing: no parameter of the same name and size"):
        compare([two[0], foreign], "parameter")
    comparison = compare([two[0], foreign], "none")
    assert comparison.shared_blocks == ("global",)
    assert comparison.overlaps == ()


def test_one_run_is_not_compared(two):
    with pytest.raises(ConfigError, match="1 run was given"):
        compare([two[0]])
    with pytest.raises(ConfigError, match="different labels"):
        compare(two, labels=["x", "x"])


def test_the_command_line_prints_and_draws(two, foreign, tmp_path, capsys):
    a, b = (run.path for run in two)
    picture = tmp_path / "both.png"
    assert cli("compare", a, b, "--blocks", "parameter", "--top", 2, "--out", picture, "--bootstrap", 5, "--quiet") == 0
    printed = capsys.readouterr().out
    assert "first.weight" in printed
    assert "Overlap of leading eigenspaces" in printed
    assert picture.stat().st_size > 1000
    assert cli("compare", a, b, "--blocks", "none", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["overlaps"][0]["k"] == 10
    assert cli("compare", a, foreign.path, "--blocks", "parameter", "--quiet") == 2
    assert "share nothing" in capsys.readouterr().err
