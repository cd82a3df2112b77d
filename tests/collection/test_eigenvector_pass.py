"""Eigenvectors of runs that kept no gradients, by one more pass with the model: those of kept ones, orthonormal."""

import shutil

import numpy as np
import pytest
import tiny_models
import torch
from command_line import cli
from factored_models import MODELS

import streamfisher as sf
from streamfisher.analysis.eigenvector_job import EigenvectorJob
from streamfisher.collection import eigenvector_pass
from streamfisher.errors import ConfigError, CorruptRunError, RunError, RunMismatchError
from streamfisher.store import open_eigenvectors


def pair(tmp_path, name="llama", dtype="float64", **options):
    """Return two runs of the same, one of which kept its gradients; with model and samples."""
    make, data = MODELS[name]
    model = make().double() if dtype == "float64" else make().float()
    settings = {"chunk_size": 4, "batch_tokens": 25, "dtype_compute": dtype, **options}
    kept, bare = (
        sf.collect(model, data(), tmp_path / keep, config=sf.SpectralConfig(keep_gradients=keep, **settings))
        for keep in ("all", "none")
    )
    for run in (kept, bare):
        run.build_grams()
    return kept, bare, model, data()


def vectors(found):
    return np.concatenate([tensor.flatten(1).double().numpy() for tensor in found.tensors().values()], axis=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("center", [False, True])
def test_they_are_those_of_kept_gradients(tmp_path, name, center):
    kept, bare, model, samples = pair(tmp_path, name)
    expected = kept.eigenvectors("global", 4, center, block_structure="none")
    found = bare.eigenvectors("global", 4, center, block_structure="none", model=model, data=samples)
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-10)
    np.testing.assert_allclose(vectors(found), vectors(expected), atol=1e-8)
    np.testing.assert_allclose(found.projections(), expected.projections(), atol=1e-8)
    assert found.orthonormality_error < 1e-12
    assert list(found.shapes) == list(expected.shapes)
    assert sf.verify(bare) == [] and not (found.path / "unturned").exists()


def test_float32_grams_give_orthonormal_vectors_down_to_small_eigenvalues(tmp_path):
    kept, bare, model, samples = pair(tmp_path, dtype="float32")
    found = bare.eigenvectors("global", 8, block_structure="none", model=model, data=samples)
    assert found.orthonormality_error < 1e-6
    G = np.concatenate([kept.store.rows.columns(n, 0, kept.parameters[n]) for n in found.shapes], axis=1).astype(float)
    V = vectors(found)
    np.testing.assert_allclose(((G @ V.T) ** 2).sum(axis=0) / len(G), found.eigenvalues, rtol=1e-4)


@pytest.mark.parametrize("options", [{"weights": True}, {"samples": [0, 2, 3, 5, 7, 8]}], ids=str)
def test_samples_and_weights_count(tmp_path, options):
    kept, bare, model, samples = pair(tmp_path)
    if "weights" in options:
        options = {"weights": np.linspace(0.5, 2.0, kept.n_samples)}
    expected = kept.eigenvectors("layer_0", 3, block_structure="layer", **options)
    found = bare.eigenvectors("layer_0", 3, block_structure="layer", model=model, data=samples, **options)
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-10)
    np.testing.assert_allclose(vectors(found), vectors(expected), atol=1e-8)


def test_little_memory_takes_more_passes_and_a_stopped_one_goes_on(tmp_path, monkeypatch):
    _, bare, model, samples = pair(tmp_path)
    once = bare.eigenvectors("global", 3, block_structure="none", model=model, data=samples)
    first = vectors(once)
    monkeypatch.setattr(eigenvector_pass, "working_memory", lambda budget: 60_000)
    passes = []
    add_up = eigenvector_pass._add_up

    def count(job, names, *others):
        passes.append(list(names))
        if len(passes) == 3:
            raise KeyboardInterrupt
        add_up(job, names, *others)

    monkeypatch.setattr(eigenvector_pass, "_add_up", count)
    again = {"block_structure": "none", "center": True, "model": model, "data": samples}
    with pytest.raises(KeyboardInterrupt):
        bare.eigenvectors("global", 3, **again)
    done = {name for names in passes[:2] for name in names}
    with pytest.raises(RunError, match="not finished"):
        open_eigenvectors(bare.path, "global", center=True)
    passes += [[], []]
    found = bare.eigenvectors("global", 3, **again)
    assert not done.intersection(name for names in passes[5:] for name in names)
    whole = bare.eigenvectors("global", 3, overwrite=True, **again)
    assert np.array_equal(vectors(whole), vectors(found))
    assert np.array_equal(vectors(open_eigenvectors(bare.path, "global")), first)


def test_gradients_that_the_grams_are_not_of_are_refused(tmp_path, monkeypatch):
    _, bare, model, samples = pair(tmp_path, dtype="float32")
    rows = eigenvector_pass.GradientEngine.rows

    def otherwise(self, batch, out, factored=()):
        found = rows(self, batch, out, factored)
        for values in out.values():
            values[0] *= 1.01
        return found

    monkeypatch.setattr(eigenvector_pass.GradientEngine, "rows", otherwise)
    with pytest.raises(RunMismatchError, match=r"not those that its Grams are of.*verify --deep"):
        bare.eigenvectors("global", 4, block_structure="none", model=model, data=samples)


@pytest.mark.parametrize("at", ["parameter-lm_head.weight", "finished"])
def test_stopped_while_it_is_written_it_goes_on_to_the_same(tmp_path, monkeypatch, at):
    kept, bare, model, samples = pair(tmp_path)
    mark = EigenvectorJob.mark

    def stops(job, what, content):
        if what == at:
            raise KeyboardInterrupt
        mark(job, what, content)

    monkeypatch.setattr(EigenvectorJob, "mark", stops)
    with pytest.raises(KeyboardInterrupt):
        bare.eigenvectors("global", 3, block_structure="none", model=model, data=samples)
    monkeypatch.undo()
    found = bare.eigenvectors("global", 3, block_structure="none", model=model, data=samples)
    np.testing.assert_allclose(
        vectors(found), vectors(kept.eigenvectors("global", 3, block_structure="none")), atol=1e-8
    )
    assert sf.verify(bare) == []


@pytest.mark.parametrize("what", ["rotation", "coefficients", "lm_head.weight"])
def test_sums_that_were_exchanged_are_not_turned(tmp_path, monkeypatch, what):
    _, bare, model, samples = pair(tmp_path)
    done = "solved" if what == "coefficients" else "parameter-lm_head.weight"
    mark = EigenvectorJob.mark

    def stops(job, name, content):
        if name == done:
            raise KeyboardInterrupt
        mark(job, name, content)

    monkeypatch.setattr(EigenvectorJob, "mark", stops)
    with pytest.raises(KeyboardInterrupt):
        bare.eigenvectors("global", 3, block_structure="none", model=model, data=samples)
    monkeypatch.undo()
    folder = bare.path / "eigenvectors/global/unturned"
    other = folder / ("coefficients" if what == "rotation" else "rotation")
    if what == "lm_head.weight":
        other = folder / "model.embed_tokens.weight"
    shutil.rmtree(folder / what)
    shutil.copytree(other, folder / what)
    with pytest.raises(CorruptRunError, match="is not what was written"):
        bare.eigenvectors("global", 3, block_structure="none", model=model, data=samples)


def test_what_does_not_fit_the_run_is_refused(tmp_path):
    kept, bare, model, samples = pair(tmp_path)
    with pytest.raises(RunError, match=r"were not kept.*one more pass with the model, `streamfisher eigenvectors"):
        bare.eigenvectors("global", 2, block_structure="none")
    with pytest.raises(ConfigError, match="both model= and data="):
        bare.eigenvectors("global", 2, block_structure="none", model=model)
    other = MODELS["llama"][0]().double()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    with pytest.raises(RunMismatchError, match=r"cannot be continued with these"):
        bare.eigenvectors("global", 2, block_structure="none", model=other, data=samples)
    with pytest.raises(ConfigError, match="there is no block 'nothing'"):
        bare.eigenvectors("nothing", 2, block_structure="none", model=model, data=samples)
    found = kept.eigenvectors("global", 2, block_structure="none")
    same = kept.eigenvectors("global", 2, block_structure="none", model=model, data=samples)  # they are there
    assert np.array_equal(vectors(found), vectors(same))


def test_skipped_samples_have_no_part(tmp_path):
    data = {name: values.double() for name, values in tiny_models.vectors(12).items()}
    data["x"][5] = torch.nan
    model = tiny_models.TinyRegression().double()
    config = sf.SpectralConfig(chunk_size=4, on_nonfinite="skip", keep_gradients="none", dtype_compute="float64")
    run = sf.collect(model, data, tmp_path / "run.zarr", config=config)
    found = run.eigenvectors("global", 2, block_structure="none", model=model, data=data)
    assert found.orthonormality_error < 1e-12
    assert np.isnan(found.projections()[5]).all() and np.isfinite(np.delete(found.projections(), 5, axis=0)).all()


def test_the_command_line_takes_model_and_data(tmp_path, capsys):
    where = ["tiny_models:regression", "tiny_models:vectors"]
    assert cli("run", *where, "--out", tmp_path / "run.zarr", "--keep-gradients", "none", "--quiet") == 0
    command = ["eigenvectors", tmp_path / "run.zarr"]
    options = ["--block", "global", "--blocks", "none", "--top", "2", "--quiet"]
    assert cli(*command, *options) == 2
    assert "one more pass with the model" in capsys.readouterr().err
    assert cli(*command, where[0], *options) == 2
    assert "DATA is missing: streamfisher eigenvectors RUN.zarr MODEL DATA" in capsys.readouterr().err
    assert cli(*command, *where, *options) == 0
    assert "2 eigenvectors of global, orthonormal to" in capsys.readouterr().out
