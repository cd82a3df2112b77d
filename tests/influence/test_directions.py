"""Shares of directions in leading eigenspaces, against eigenvectors of the dense Fisher in parameter space."""

import csv
import json

import numpy as np
import pytest
import torch
from command_line import cli
from safetensors.torch import save_file
from tiny_runs import PATTERNS, make_run, rows

from streamfisher.errors import ConfigError, DataError, RunError, RunMismatchError

N = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("directions") / "run.zarr")


def step_of(run, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {item["name"]: item["shape"] for item in run.manifest.parameters}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def shares(G, w, center, directions, k):
    """Return (m, k): squared cosines of directions with the leading eigenvectors of the (P, P) Fisher."""
    m = (w @ G) / w.sum()
    G = (G - m if center else G) * np.sqrt(w / w.sum())[:, None]
    V = np.linalg.eigh(G.T @ G)[1][:, ::-1][:, :k]
    return np.square(directions @ V) / np.square(directions).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("stored_centered", [False, True])
def test_shares_are_those_of_eigenvectors_in_parameter_space(run, tmp_path, center, weighted, stored_centered):
    held = make_run(tmp_path / "run.zarr", store_centered=True) if stored_centered else run
    w = np.random.default_rng(0).uniform(0.1, 2, N) if weighted else None
    step = step_of(run)
    found = held.directions(4, center=center, block_structure=PATTERNS, update=step, weights=w)
    assert found.directions == ("mean gradient", "update")
    for key, names in run.block_grams(PATTERNS).blocks.items():
        G, weights = rows(run, names), np.ones(N) if w is None else w
        flat = np.concatenate([step[name].numpy().ravel() for name in names])
        directions = np.stack([(weights @ G) / weights.sum(), flat])
        part = found.blocks[key]
        np.testing.assert_allclose(part.shares, shares(G, weights, center, directions, 4), rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(part.squared_norms, np.square(directions).sum(axis=1), rtol=1e-10)
        assert (part.rounding < 1e-6).all()
        assert part.expected_of_random == pytest.approx(4 / G.shape[1])


@pytest.mark.parametrize("within", [False, True])
def test_queries_are_directions_too(run, tmp_path, within):
    if within:
        found = run.directions(3, "global", queries=[20, 21])
        train, of_queries = np.arange(20), rows(run)[[20, 21]]
        train = np.setdiff1d(np.arange(N), [20, 21])
    else:
        found = run.directions(3, "global", queries=make_run(tmp_path / "q.zarr", 8), query_samples=[1, 2])
        train, of_queries = np.arange(N), rows(make_run(tmp_path / "q.zarr", 8))[[1, 2]]
    G = rows(run)[train]
    directions = np.concatenate([G.mean(axis=0)[None], of_queries])
    expected = shares(G, np.ones(len(G)), False, directions, 3)
    np.testing.assert_allclose(found.blocks["global"].shares, expected, rtol=1e-7, atol=1e-10)
    assert found.directions[1:] == (("query 20", "query 21") if within else ("query 1", "query 2"))


@pytest.mark.parametrize("center", [False, True])
def test_standard_errors_are_the_spread_over_resamples_of_the_rows(run, center):
    step = step_of(run)
    found = run.directions(2, "global", center, update=step, bootstrap=5).blocks["global"]
    G, flat = rows(run), np.concatenate([value.numpy().ravel() for value in step.values()])
    drawn = []
    for resample in range(5):
        chosen = np.random.Generator(np.random.PCG64([run.config.seed, resample])).integers(0, N, N)
        directions = np.stack([G[chosen].mean(axis=0), flat])
        drawn.append(shares(G[chosen], np.ones(N), center, directions, 2).sum(axis=1))
    np.testing.assert_allclose(found.standard_errors, np.std(drawn, axis=0, ddof=1), rtol=1e-6)


def test_a_block_that_all_eigenvectors_span_holds_everything(run):
    part = run.directions(2, "second.bias", block_structure="parameter", update=step_of(run)).blocks["second.bias"]
    np.testing.assert_allclose(part.total, 1.0, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top": 0}, ConfigError, "at least 1 eigenvector"),
        ({"bootstrap": 1}, ConfigError, "at least 2 resamples"),
        ({"block": "layer_5"}, ConfigError, "no block 'layer_5'"),
        ({"partial": True}, ConfigError, "finished runs only"),
        ({"update": {"first.weight": np.zeros((5, 3))}}, DataError, "has no parameter 'first.bias'"),
        ({"update": "nowhere.safetensors"}, DataError, "must be a .safetensors file that exists"),
    ],
)
def test_what_cannot_be_used_is_refused(run, options, error, message):
    with pytest.raises(error, match=message):
        run.directions(**options)


def test_an_update_of_another_shape_or_that_is_not_finite_is_refused(run):
    wrong = step_of(run) | {"first.bias": torch.zeros(4)}
    with pytest.raises(DataError, match=r"first.bias has the shape \(4,\), and the parameter \(5,\)"):
        run.directions(update=wrong)
    broken = step_of(run)
    broken["first.bias"][2] = float("nan")
    with pytest.raises(DataError, match=r"first.bias is not finite"):
        run.directions(update=broken)


def test_runs_that_keep_no_gradients_know_their_mean_and_no_update(run, tmp_path):
    bare = make_run(tmp_path / "bare.zarr", keep_gradients=(), hold="host")
    kept = run.directions(3).blocks
    for key, part in bare.directions(3).blocks.items():
        np.testing.assert_allclose(part.shares, kept[key].shares, rtol=1e-8)
    with pytest.raises(RunError, match=r"keeps no gradients of first.weight, and an update"):
        bare.directions(3, update=step_of(run))
    with pytest.raises(RunError, match="keeps no gradients"):
        run.directions(3, queries=bare)
    with pytest.raises(RunError, match="share of a direction cannot be had"):
        make_run(tmp_path / "projected.zarr", project=2).directions(3)
    with pytest.raises(RunMismatchError, match="absent there"):
        run.directions(3, queries=make_run(tmp_path / "other.zarr", exclude=("first.bias",)))


def test_the_command_says_what_python_says(run, tmp_path, capsys):
    update = tmp_path / "step.safetensors"
    save_file(step_of(run) | {"frozen": torch.zeros(2)}, update)
    line = ("directions", run.path, "--top", 3, "--update", update, "--queries", "20:24", "--bootstrap", 3, "--quiet")
    assert cli(*line, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    found = run.directions(3, update=update, queries=slice(20, 24), bootstrap=3)
    assert printed == json.loads(json.dumps(found.to_dict()))
    assert cli(*line, "--out", tmp_path / "shares.csv") == 0
    shown = capsys.readouterr().out
    assert "leading eigenvectors of the Fisher" in shown
    assert "left out of the update: frozen" in shown
    with (tmp_path / "shares.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found.blocks) * 6
    assert float(table[0]["share"]) == next(iter(found.blocks.values())).total[0]


def test_a_file_that_is_no_update_is_refused(run, tmp_path, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    assert cli("directions", run.path, "--update", tmp_path / "bad.safetensors", "--quiet") == 2
    assert "cannot be read as safetensors" in capsys.readouterr().err
