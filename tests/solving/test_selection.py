"""Subsets, weights, own blocks, alignment and unfinished runs, against dense float64 matrices."""

import json

import numpy as np
import pytest
from command_line import cli
from tiny_runs import PATTERNS, forget_last_unit, make_run, rows

import streamfisher as sf
from streamfisher.analysis.alignment import inner_products
from streamfisher.errors import ConfigError, DataError, RunError

N = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("selection") / "run.zarr")
    run.build_grams()
    return run


def dense(G, weights=None, center=False, denominator=None):
    w = np.ones(len(G)) if weights is None else weights
    if center:
        G = G - (w @ G) / w.sum()
    F = (G * w[:, None]).T @ G / (w.sum() if denominator is None else denominator)
    return np.linalg.eigvalsh(F)[::-1]


def agree(found, expected):
    length = min(len(found), len(expected))
    np.testing.assert_allclose(found[:length], expected[:length], atol=1e-12 * expected[0])
    assert np.all(np.abs(expected[length:]) < 1e-12 * expected[0])


SUBSETS = {
    "slice": slice(3, 20, 2),
    "mask": np.arange(N) % 3 == 0,
    "ids in any order": [7, 2, 19, 2, 11, 23],
    "ids from the end": np.array([-1, -5, 0, 4]),
}


@pytest.mark.parametrize("samples", SUBSETS.values(), ids=SUBSETS)
@pytest.mark.parametrize("center", [False, True])
def test_a_subset_is_the_fisher_of_its_rows(run, samples, center):
    chosen = np.unique(np.arange(N)[samples])
    spectrum = run.spectrum("none", center, samples)
    agree(spectrum.global_.eigenvalues, dense(rows(run)[chosen], center=center))
    assert spectrum.metadata["n_samples"] == len(chosen)


@pytest.mark.parametrize("samples", [None, slice(2, 15)])
@pytest.mark.parametrize("center", [False, True])
def test_weights_are_those_of_the_definition(run, samples, center):
    weights = np.random.default_rng(0).uniform(0, 3, N)
    weights[4] = 0
    chosen = np.arange(N)[samples or slice(None)]
    spectrum = run.spectrum(PATTERNS, center, samples, weights=weights)
    for key, block in spectrum.blocks.items():
        G = rows(run, [name for name in run.parameters if name.startswith(key)])[chosen]
        agree(block.eigenvalues, dense(G, weights[chosen], center))
    assert spectrum.metadata["n_samples"] == len(chosen) - 1
    assert "W" in spectrum.metadata["normalization"]


def test_equal_weights_change_nothing(run):
    plain, weighted = run.spectrum("none"), run.spectrum("none", weights=np.full(N, 7.0))
    np.testing.assert_allclose(weighted.global_.eigenvalues, plain.global_.eigenvalues, atol=1e-14)


@pytest.mark.parametrize("center", [False, True])
def test_tokens_divide_by_the_target_tokens(run, center, monkeypatch):
    targets = np.random.default_rng(1).integers(1, 9, N)
    original = run.store.samples.per_sample
    monkeypatch.setattr(
        run.store.samples, "per_sample", lambda what: targets if what == "n_targets" else original(what)
    )
    weights = np.linspace(0.5, 2, N)
    found = run.spectrum("none", center, normalization="tokens", weights=weights)
    agree(found.global_.eigenvalues, dense(rows(run), weights, center, denominator=weights @ targets))
    assert "sum(w * tokens)" in found.metadata["normalization"]


REFUSED = {
    "no sample": ({"samples": []}, "0 valid samples are selected"),
    "an empty mask": ({"samples": np.zeros(N, bool)}, "0 valid samples"),
    "a mask of another length": ({"samples": np.ones(5, bool)}, r"must have 24 entries, not \(5,\)"),
    "a sample that is not there": ({"samples": [1, 99]}, "sample 99 was selected and the run has samples 0 to 23"),
    "fractions of samples": ({"samples": [0.5, 1.5]}, "whole numbers"),
    "weights of another length": ({"weights": np.ones(7)}, r"shape \(7,\) and the run has 24 samples"),
    "a negative weight": ({"weights": np.r_[-1.0, np.ones(N - 1)]}, "weight of sample 0 is -1.0"),
    "a weight that is no number": ({"weights": np.r_[np.nan, np.ones(N - 1)]}, "weight of sample 0 is nan"),
    "weights of zero": ({"weights": np.zeros(N)}, "0 valid samples with a positive weight"),
    "an unknown normalization": ({"normalization": "bytes"}, "'bytes' is unknown; choose samples or tokens"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_selected_is_refused(run, options, message):
    with pytest.raises((DataError, ConfigError), match=message):
        run.spectrum("none", **options)


BAD_BLOCKS = {
    "overlapping": ({"first.*": "a", "*.weight": "b", "*": "c"}, "'first.weight' belongs to 2 blocks, a and b"),
    "missing": ({"first.*": "a"}, "'second.weight' matches none"),
    "matching nothing": ({"third.*": "a", "*": "b"}, "'third.*' matches no parameter"),
}


@pytest.mark.parametrize(("patterns", "message"), BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_blocks_that_overlap_or_miss_are_refused(run, patterns, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        run.spectrum(patterns)


def test_alignment_is_that_of_dense_grams(run):
    for center in (False, True):
        found = run.alignment("parameter", center)
        K = []
        for name in run.parameters:
            G = rows(run, [name])
            G = G - G.mean(axis=0) if center else G
            K.append(G @ G.T)
        expected = [[np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for b in K] for a in K]
        np.testing.assert_allclose(found.matrix, expected, atol=1e-12)
        assert found.blocks == tuple(run.parameters)


def test_alignment_and_block_error_are_two_sides_of_one_coin(run):
    grams = run.block_grams("parameter", False)
    products = inner_products(grams.gram, list(grams.blocks), tile=2)
    off = products.sum() - np.trace(products)
    error = run.spectrum("parameter", False).metadata["block_diagonal_error"]
    assert np.sqrt(off / products.sum()) == pytest.approx(error)


def test_tiles_change_no_product(run):
    grams = run.block_grams("parameter", False)
    results = [inner_products(grams.gram, list(grams.blocks), tile) for tile in (1, 3, 9)]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


@pytest.mark.parametrize("stored_centered", [False, True])
def test_an_unfinished_run_is_analysed_only_on_request_and_marked(tmp_path, stored_centered):
    run = make_run(tmp_path / "run.zarr", store_centered=stored_centered)
    whole = run.spectrum("none", False).global_.eigenvalues
    half = run.spectrum("none", False, slice(0, 16)).global_.eigenvalues
    forget_last_unit(run)
    before = sorted(path for path in run.path.rglob("*"))
    with pytest.raises(RunError, match="not finished: 16 of 24"):
        run.spectrum("none")
    for center in (False, True):
        spectrum = run.spectrum("none", center, partial=True)
        assert spectrum.metadata["partial"] is True
        assert spectrum.metadata["n_samples"] == spectrum.metadata["samples_collected"] == 16
    np.testing.assert_allclose(run.spectrum("none", False, partial=True).global_.eigenvalues, half, atol=1e-13)
    assert not np.allclose(half, whole[: len(half)])
    assert sorted(path for path in run.path.rglob("*")) == before, "nothing is written into an unfinished run"


def test_partial_on_a_finished_run_is_the_whole_run(run):
    spectrum = run.spectrum("none", partial=True)
    assert spectrum.metadata["partial"] is False
    assert spectrum.metadata["n_samples"] == N


def test_the_command_line_reads_files(run, tmp_path, capsys):
    (tmp_path / "blocks.yaml").write_text("first.*: early\n'*': late\n")
    (tmp_path / "ids.txt").write_text("1\n5\n7\n")
    np.save(tmp_path / "weights.npy", np.arange(N))
    files = (
        "--blocks",
        tmp_path / "blocks.yaml",
        "--samples",
        tmp_path / "ids.txt",
        "--weights",
        tmp_path / "weights.npy",
    )
    assert cli("spectrum", run.path, *files, "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["per_block"]) == ["early", "late"]
    assert found["metadata"]["n_samples"] == 3
    expected = run.spectrum({"first.*": "early", "*": "late"}, False, [1, 5, 7], weights=np.arange(N))
    assert found["global"]["eigenvalues"] == expected.to_dict()["global"]["eigenvalues"]


def test_an_unfinished_run_is_marked_in_the_table(tmp_path, capsys):
    run = make_run(tmp_path / "run.zarr")
    forget_last_unit(run)
    assert cli("spectrum", run.path, "--quiet") == 2
    assert cli("spectrum", run.path, "--partial", "--quiet") == 0
    assert "PARTIAL RUN (16 of 24 samples)" in capsys.readouterr().out
    assert sf.open_run(run.path).info()["complete"] is False


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--weights", None, "there is no such file"),
        ("--weights", np.ones((2, 2)), "one number per sample"),
        ("--samples", np.ones(3), "sample numbers or a mask"),
        ("--samples", np.array([0, 77]), "sample 77"),
    ],
)
def test_files_that_cannot_be_used(run, tmp_path, capsys, option, content, message):
    if content is not None:
        np.save(tmp_path / "file.npy", content)
    assert cli("spectrum", run.path, option, tmp_path / "file.npy", "--quiet") == 2
    assert message in capsys.readouterr().err
