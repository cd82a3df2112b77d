"""Queries in the run itself, of weight zero; and queries of another run whose gradients nobody kept."""

import numpy as np
import pytest
import torch
from command_line import cli
from tiny_models import TinyRegression, vectors
from tiny_runs import PATTERNS, make_run

import streamfisher as sf
from streamfisher.errors import ConfigError, RunError, RunMismatchError

N, Q = 24, 6
BARE = {"keep_gradients": (), "hold": "host"}


def data(n=N):
    return {name: values.double() for name, values in vectors(n).items()}


def query_data(count=Q):
    generator = torch.Generator().manual_seed(11)
    x, labels = (torch.randn(count, size, generator=generator).double() for size in (3, 2))
    return {"x": x, "labels": labels}


def both():
    return {name: torch.cat([values, query_data()[name]]) for name, values in data().items()}


def model():
    return TinyRegression().double()


def collected(path, samples, **options):
    settings = {"chunk_size": 4, "dtype_model": "float64", "dtype_compute": "float64"} | options
    return sf.collect(model(), samples, path, config=sf.SpectralConfig(**settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Training samples and queries, with their gradients and without."""
    folder = tmp_path_factory.mktemp("queries")
    kept = make_run(folder / "run.zarr"), collected(folder / "queries.zarr", query_data())
    bare = make_run(folder / "bare.zarr", **BARE), collected(folder / "bare-queries.zarr", query_data(), **BARE)
    return kept, bare


def same(found, other):
    assert found.blocks.keys() == other.blocks.keys()
    for key, part in found.blocks.items():
        for name in ("inner", "damped", "query_squared_norms"):
            one, two = getattr(part, name), getattr(other.blocks[key], name)
            np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-11 * np.abs(two).max(), err_msg=f"{key} {name}")


@pytest.mark.parametrize("budget", [None, "1MB"])
@pytest.mark.parametrize(("train", "query"), [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("structure", ["none", PATTERNS], ids=["none", "patterns"])
def test_gradients_that_were_not_kept_are_formed_again(runs, monkeypatch, train, query, structure, budget):
    if budget is not None:  # one parameter after the other
        monkeypatch.setattr("streamfisher.collection.cross_pass._SHARE", 1e-12)
    run, queries = runs[train][0], runs[query][1]
    again = {"data": data() if train else None, "query_data": query_data() if query else None}
    found = run.influence(queries, [1e-2, 1.0], block_structure=structure, model=model(), **again)
    same(found, runs[0][0].influence(runs[0][1], [1e-2, 1.0], block_structure=structure))
    few = run.influence(queries, 1e-2, query_samples=[1, 4], samples=slice(3, 20), model=model(), **again)
    same(few, runs[0][0].influence(runs[0][1], 1e-2, query_samples=[1, 4], samples=slice(3, 20)))


def test_what_gives_other_gradients_is_refused(runs):
    (kept, queries), (bare, bare_queries) = runs
    with pytest.raises(RunError, match=r"keeps no gradients of first.weight, .* --query-data"):
        bare.influence(queries, 0.1)
    with pytest.raises(ConfigError, match=r"bare.zarr keeps no gradients of first.weight; .*data= \(DATA\)"):
        bare.influence(queries, 0.1, model=model())
    with pytest.raises(ConfigError, match=r"query_data= \(--query-data\)"):
        kept.influence(bare_queries, 0.1, model=model())
    with pytest.raises(ConfigError, match="takes model= beside data="):
        bare.influence(queries, 0.1, data=data())
    with pytest.raises(RunMismatchError, match="cannot be multiplied with these"):
        bare.influence(queries, 0.1, model=TinyRegression(seed=1).double(), data=data())
    with pytest.raises(RunMismatchError, match="samples 0 to 7 have other contents"):
        bare.influence(queries, 0.1, model=model(), data={**data(), "x": data()["x"] + 1})


def test_queries_added_to_a_run_have_weight_zero(runs, tmp_path):
    alone = runs[0][0]
    run = make_run(tmp_path / "run.zarr")
    before = run.spectrum("none").global_.eigenvalues
    run = run.add(model(), both(), role="query")
    assert run.n_samples == N + Q and run.is_query.tolist() == [False] * N + [True] * Q
    spectrum = run.spectrum("none")
    np.testing.assert_allclose(spectrum.global_.eigenvalues, before, rtol=1e-9, atol=1e-15)
    assert spectrum.metadata["n_samples"] == N and spectrum.metadata["n_queries"] == Q
    every = run.spectrum("none", samples=slice(None), weights=np.ones(N + Q)).global_
    np.testing.assert_allclose(every.eigenvalues, before, rtol=1e-9, atol=1e-15)
    assert run.samples(top=2).samples.max() == N - 1
    same(run.influence(None, [1e-2, 1.0]), alone.influence(runs[0][1], [1e-2, 1.0]))
    same(run.influence([N], 0.1), alone.influence(runs[0][1], 0.1, query_samples=[0]))
    assert sf.open_run(run.path).is_query.sum() == Q and sf.verify(run) == []


def test_a_run_with_queries_goes_on_growing(tmp_path):
    first, more = {k: v[:10] for k, v in data().items()}, data()
    run = collected(tmp_path / "run.zarr", first)
    middle = {k: torch.cat([v, query_data()[k]]) for k, v in first.items()}
    run = run.add(model(), middle, role="query")
    run = run.add(model(), middle, role="query")  # nothing is new
    everything = {k: torch.cat([v, more[k][10:]]) for k, v in middle.items()}
    run = run.add(model(), everything)
    assert run.is_query.tolist() == [False] * 10 + [True] * Q + [False] * (N - 10)
    whole = make_run(tmp_path / "whole.zarr").spectrum("none").global_.eigenvalues
    np.testing.assert_allclose(run.spectrum("none").global_.eigenvalues, whole, rtol=1e-9, atol=1e-15)
    with pytest.raises(ConfigError, match="role='test' is unknown; choose train or query"):
        run.add(model(), everything, role="test")


def test_from_the_command_line(tmp_path, capsys):
    where = ("tiny_models:regression", "tiny_models:vectors")
    common = ("--chunk-size", 4, "--blocks", "none", "--quiet", "--keep-gradients", "none")
    for name in ("run", "queries"):
        assert cli("run", *where, "--out", tmp_path / f"{name}.zarr", *common) == 0
    asked = ("--queries", tmp_path / "queries.zarr", "--damping", "0.1", "--quiet")
    assert cli("influence", tmp_path / "run.zarr", *asked) == 2
    assert cli("influence", tmp_path / "run.zarr", *where, *asked) == 2
    assert "--query-data" in capsys.readouterr().err
    assert cli("influence", tmp_path / "run.zarr", *where, "--query-data", where[1], *asked) == 0
    assert "influence at a damping of 0.1" in capsys.readouterr().out
    assert cli("influence", tmp_path / "run.zarr", *where, "--queries", "0:2", "--damping", "1", "--quiet") == 2
    assert "samples of this one need neither" in capsys.readouterr().err
