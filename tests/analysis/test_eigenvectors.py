"""Eigenvectors in parameter space against numpy's of the dense Fisher; resumed, refused, exported, projected."""

import json

import numpy as np
import pytest
import torch
from command_line import cli
from safetensors.torch import load_file
from tiny_runs import PATTERNS, forget_last_unit, make_run, rows

import streamfisher as sf
from streamfisher import demo
from streamfisher.analysis import eigenvectors as module
from streamfisher.analysis.eigenvector_job import EigenvectorJob
from streamfisher.api import open_run
from streamfisher.errors import ConfigError, CorruptRunError, DataError, RunError
from streamfisher.store import open_eigenvectors

BLOCK = {"block_structure": PATTERNS}


def dense(run, names, center=False, weights=None, samples=None):
    G = rows(run, names)
    w = np.ones(len(G)) if weights is None else weights
    if samples is not None:
        G, w = G[samples], w[samples]
    G = G - (w @ G) / w.sum() if center else G
    values, vectors = np.linalg.eigh((G * w[:, None]).T @ G / w.sum())
    return values[::-1], vectors[:, ::-1].T


def stacked(found):
    return np.concatenate([array.compute() for array in found.arrays().values()], axis=1)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("stored_centered", [False, True])
def test_vectors_and_values_are_those_of_the_dense_fisher(tmp_path, center, weighted, stored_centered):
    run = make_run(tmp_path / "run.zarr", store_centered=stored_centered)
    plain = make_run(tmp_path / "plain.zarr") if stored_centered else run
    weights = np.random.default_rng(0).uniform(0.1, 2, 24) if weighted else None
    samples = slice(2, 22) if weighted else None
    found = run.eigenvectors("first", 5, center, **BLOCK, weights=weights, samples=samples)
    names = [name for name in run.parameters if name.startswith("first")]
    values, vectors = dense(plain, names, center, weights, samples)
    np.testing.assert_allclose(found.eigenvalues, values[:5], rtol=1e-10)
    V = stacked(found)
    np.testing.assert_allclose(V @ V.T, np.eye(5), atol=1e-10)
    np.testing.assert_allclose(np.abs(np.sum(V * vectors[:5], axis=1)), 1, atol=1e-10)
    np.testing.assert_allclose(found.projections(), rows(plain, names) @ V.T, atol=1e-10)
    assert found.orthonormality_error < 1e-10


def test_float32_runs_are_orthonormal_to_1e_6_down_to_small_eigenvalues(tmp_path):
    from streamfisher import SpectralConfig, collect

    run = collect(demo.load_demo_model(), demo.demo_samples(24, 32), tmp_path / "r.zarr", config=SpectralConfig())
    found = run.eigenvectors("layer_1", 23)
    V = stacked(found).astype(np.float64)
    assert V.dtype == np.float64
    assert np.abs(V @ V.T - np.eye(23)).max() < 1e-6
    assert found.orthonormality_error < 1e-6
    G = rows(run, list(found.shapes))
    for value, v in zip(found.eigenvalues, V, strict=True):
        np.testing.assert_allclose(np.linalg.norm(G.T @ (G @ v) / 24 - value * v) / value, 0, atol=1e-4)


def test_a_kill_between_parameters_costs_only_what_is_not_marked(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run.zarr")
    run.build_grams()
    original = EigenvectorJob.mark

    def killed(job, what, content):
        if what == "parameter-second.weight":
            raise KeyboardInterrupt
        original(job, what, content)

    monkeypatch.setattr(EigenvectorJob, "mark", killed)
    with pytest.raises(KeyboardInterrupt):
        run.eigenvectors("global", 4, block_structure="none")
    monkeypatch.undo()
    with pytest.raises(RunError, match="not finished"):
        open_eigenvectors(run.path, "global")
    done = run.path / "eigenvectors" / "global" / "vectors" / "first.weight"
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    resumed = stacked(run.eigenvectors("global", 4, block_structure="none"))
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()} == before
    fresh = make_run(tmp_path / "fresh.zarr").eigenvectors("global", 4, block_structure="none")
    assert np.array_equal(resumed, stacked(fresh))


@pytest.mark.parametrize("representation", ["dense", "factors"])
def test_eigenvectors_are_made_neither_of_unfinished_rows_nor_of_chunks_that_vanish(
    tmp_path, monkeypatch, representation
):
    run = make_run(tmp_path / "run.zarr", representation=representation)
    grams = run.block_grams("none")
    whole = set((run.path / "done").glob("rows-*.json"))
    (run.path / "done" / "rows-000001.json").rename(tmp_path / "marker")
    with pytest.raises(RunError, match="no gradients yet of samples"):  # the run looked whole when it was opened
        module.compute_eigenvectors(run.store, grams, "global", 2)
    (tmp_path / "marker").rename(run.path / "done" / "rows-000001.json")
    assert set((run.path / "done").glob("rows-*.json")) == whole

    look = type(run.store.rows)._require_bound

    def vanish_afterwards(self, name):
        todo = look(self, name)
        for folder in ("gradients", "factors"):
            for chunk in (run.path / folder).rglob("c/*/*"):
                chunk.unlink(missing_ok=True)
        return todo

    monkeypatch.setattr(type(run.store.rows), "_require_bound", vanish_afterwards)
    with pytest.raises(CorruptRunError, match=r"missing|lacks"):
        module.compute_eigenvectors(run.store, grams, "global", 2, overwrite=True)


def test_other_eigenvectors_are_not_overwritten_unless_asked(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    run.eigenvectors("first", 3, **BLOCK)
    with pytest.raises(RunError, match=r"differ in top \(3 there, 4 now\); --overwrite"):
        run.eigenvectors("first", 4, **BLOCK)
    assert len(run.eigenvectors("first", 4, **BLOCK, overwrite=True)) == 4
    assert len(open_eigenvectors(run.path, "first")) == 4
    with pytest.raises(RunError, match="samples_and_weights"):
        run.eigenvectors("first", 4, **BLOCK, samples=slice(0, 20))


def test_what_is_not_there_is_refused(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    with pytest.raises(ConfigError, match="no block 'layer_9'; the blocks are first, second"):
        run.eigenvectors("layer_9", **BLOCK)
    with pytest.raises(ConfigError, match=r"24 eigenvectors.*ask for 1 to"):
        run.eigenvectors("second", 24, **BLOCK)
    with pytest.raises(RunError, match="not there"):
        open_eigenvectors(run.path, "first")
    forget_last_unit(run)
    with pytest.raises(RunError, match="not finished"):
        run.eigenvectors("first", **BLOCK)


def test_directions_tensors_files_and_projections(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    found = run.eigenvectors("first", 3, **BLOCK)
    tensors, second = found.tensors(), found.direction(1)
    assert tensors["first.weight"].shape == (3, 5, 3)
    assert torch.equal(second["first.weight"], tensors["first.weight"][1])
    assert torch.equal(found.direction(-2)["first.bias"], second["first.bias"])
    with pytest.raises(DataError, match="no eigenvector 3"):
        found.direction(3)
    stored = load_file(found.save_safetensors(tmp_path / "v.safetensors"))
    assert torch.equal(stored["first.weight"], tensors["first.weight"])
    new = {name: torch.randn(4, *shape, dtype=torch.float64) for name, shape in found.shapes.items()}
    expected = sum(new[name].reshape(4, -1).numpy() @ tensors[name].reshape(3, -1).numpy().T for name in new)
    np.testing.assert_allclose(found.project(new), expected, atol=1e-12)
    with pytest.raises(DataError, match=r"gradients of first.bias are missing"):
        found.project({"first.weight": new["first.weight"]})
    with pytest.raises(DataError, match=r"not \(m, 5\)"):
        found.project({**new, "first.bias": torch.zeros(4, 6)})


def test_eigenvectors_of_changed_grams_are_refused(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    run.eigenvectors("first", 2, **BLOCK)
    gram, products = run.store.grams.read("first.bias")
    run.store.grams.write("first.bias", 2 * gram, products, {})
    with pytest.raises(RunError, match=r"Gram of first.bias is not the one"):
        open_eigenvectors(run.path, "first")


@pytest.mark.parametrize("what", ["solved", "parameter-first.weight", "finished"])
def test_a_marker_that_is_another_file_of_the_run_is_found_and_made_again(tmp_path, what):
    run = make_run(tmp_path / "run.zarr")
    run.eigenvectors("first", 2, **BLOCK)
    marks = run.path / "done" / "eigenvectors" / "first"
    before = {path.name: path.read_bytes() for path in marks.iterdir()}
    for other in (run.path / "zarr.json", marks / "identity.json", run.path / "done" / "gram-first.weight.json"):
        (marks / f"{what}.json").write_bytes(other.read_bytes())
        assert [problem.what for problem in sf.verify(run)] == ["eigenvectors"]
        sf.verify(run, repair=True)
        run.eigenvectors("first", 2, **BLOCK)
        assert {path.name: path.read_bytes() for path in marks.iterdir()} == before


def test_the_command_line_writes_and_says_where(tmp_path, capsys):
    run = make_run(tmp_path / "run.zarr")
    command = ("eigenvectors", run.path, "--blocks", "none", "--block", "global", "--top", 3, "--quiet")
    assert cli(*command, "--json", "--out", tmp_path / "v.safetensors") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["eigenvalues"]) == 3
    assert (tmp_path / "v.safetensors").is_file()
    assert cli(*command, "--center") == 0
    assert "orthonormal to" in capsys.readouterr().out
    assert len(open_eigenvectors(open_run(run.path).path, "global", center=True)) == 3
