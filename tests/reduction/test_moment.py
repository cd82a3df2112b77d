"""Parameters with fewer elements than samples are solved on their own side, to the same eigenvalues."""

import shutil

import float64_loop
import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch

import streamfisher as sf
from streamfisher import verify
from streamfisher.errors import CorruptRunError
from streamfisher.reduction import moment_of
from streamfisher.runtime import durable, read_json, write_json
from streamfisher.sinks import MemoryRows
from streamfisher.store import node_name

N = 24  # of the parameters, three have 15, 10, 5 and 2 elements


def loop_rows():
    model = tiny_models.TinyRegression(0)
    data = tiny_models.vectors(N)
    samples = [{key: value[i] for key, value in data.items()} for i in range(N)]
    return float64_loop.gradient_rows(model, samples, lambda m, b: ((m(b["x"]) - b["labels"]) ** 2).sum(dim=1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_runs.make_run(tmp_path_factory.mktemp("moment") / "run.zarr", N, loss="regression")


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("centered_store", [False, True])
def test_eigenvalues_are_those_of_a_float64_loop(tmp_path, center, centered_store):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N, store_centered=centered_store)
    rows = {name: tiny_runs.rows(run, [name]) for name in run.parameters}
    if centered_store:
        rows = {name: values + run.store.means.mean(name, 0, values.shape[1]) for name, values in rows.items()}
    spectrum = run.spectrum("parameter", center)
    for name, block in spectrum.blocks.items():
        expected = float64_loop.eigenvalues(rows, [name], center)
        assert block.solved_side == "parameters" and len(block.eigenvalues) == run.parameters[name]
        np.testing.assert_allclose(block.eigenvalues, expected, rtol=0, atol=1e-12 * expected[0])


def test_rows_are_those_of_autograd(run):
    ours = tiny_runs.rows(run)
    theirs = np.concatenate(list(loop_rows().values()), axis=1)
    ratio = np.linalg.norm(ours) / np.linalg.norm(theirs)  # the loss of a regression may carry a constant factor
    np.testing.assert_allclose(ours, ratio * theirs, rtol=0, atol=1e-12 * np.abs(ours).max())


@pytest.mark.parametrize("center", [False, True])
def test_both_sides_agree_and_the_whole_mixes_them(run, center):
    grams = run.block_grams("parameter", center)
    by_gram = grams.__class__(**{**vars(grams), "moment_of": lambda name: None}).spectrum()
    by_moment = grams.spectrum()
    for key, block in by_gram.blocks.items():
        assert (block.solved_side, by_moment.blocks[key].solved_side) == ("samples", "parameters")
        np.testing.assert_allclose(
            by_moment.blocks[key].eigenvalues, block.eigenvalues, rtol=0, atol=1e-12 * block.eigenvalues[0]
        )
        np.testing.assert_allclose(by_moment.blocks[key].trace, block.trace, rtol=1e-12)
    assert by_moment.metadata["block_diagonal_error"] == by_gram.metadata["block_diagonal_error"]
    np.testing.assert_allclose(by_moment.global_.norm, by_gram.global_.norm, rtol=1e-12)


def test_a_block_of_several_parameters_uses_grams_and_structures_mix(run):
    names = list(run.parameters)
    spectrum = run.spectrum({names[0]: "one", "*": "rest"})
    assert {key: block.solved_side for key, block in spectrum.blocks.items()} == {
        "one": "parameters",
        "rest": "samples",
    }
    assert spectrum.to_dict()["per_block"]["one"]["solved_side"] == "parameters"
    assert spectrum.global_.solved_side == "parameters, samples"


@pytest.mark.parametrize("options", [{"samples": slice(0, 20)}, {"weights": np.linspace(1, 2, N)}])
def test_subsets_and_weights_use_grams(run, options):
    assert {block.solved_side for block in run.spectrum("parameter", **options).blocks.values()} == {"samples"}


def test_it_works_after_the_gradients_are_gone(tmp_path):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N)
    before = run.spectrum("parameter")
    shutil.rmtree(run.path / "gradients")
    after = type(run)(run.path).spectrum("parameter")
    assert all(np.array_equal(after.blocks[key].eigenvalues, block.eigenvalues) for key, block in before.blocks.items())


def test_skipped_samples_do_not_count(tmp_path):
    rows = {"p": np.random.default_rng(0).standard_normal((600, 4))}
    valid = np.arange(600) % 7 != 0
    found = moment_of(MemoryRows(rows), "p", 4, valid)
    part = rows["p"][valid]
    np.testing.assert_allclose(found.matrix(center=False), part.T @ part, rtol=1e-12)
    np.testing.assert_allclose(found.matrix(center=True), len(part) * np.cov(part.T, bias=True), rtol=1e-11)
    assert np.array_equal(found.second, found.second.T) and found.count == valid.sum()


def test_a_moment_of_fewer_samples_is_not_used(tmp_path):
    model = tiny_models.TinyRegression(0).double()
    data = {key: values.double() for key, values in tiny_models.vectors(N).items()}
    config = sf.SpectralConfig(chunk_size=8, dtype_compute="float64", dtype_model="float64")
    run = sf.collect(model, data, tmp_path / "run.zarr", config=config, n_samples=16)
    run.build_grams()
    grown = run.add(model, data)
    name = next(iter(run.parameters))
    assert run.store.moments.read(name) is not None and grown.store.moments.read(name) is None
    assert {block.solved_side for block in grown.spectrum("parameter").blocks.values()} == {"parameters"}
    assert grown.store.moments.read(name).count == N


def test_a_damaged_moment_is_refused(tmp_path):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N)
    run.build_grams()
    name = next(iter(run.parameters))
    marker = run.path / "done" / f"moment-{node_name(name)}.json"
    write_json(marker, read_json(marker) | {"crc32c": 1})
    with pytest.raises(CorruptRunError, match=rf"the moment of {name} is not what was written; .*--rebuild"):
        run.spectrum("parameter")


def test_it_is_written_before_the_marker_of_its_gram(tmp_path, monkeypatch):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N)
    put = durable.put_in_place

    def stop(partial, path):
        if path.name == "gram-first.bias.json":
            raise KeyboardInterrupt
        put(partial, path)

    monkeypatch.setattr(durable, "put_in_place", stop)
    with pytest.raises(KeyboardInterrupt):
        run.build_grams(run.config.replace(n_workers=1))
    monkeypatch.undo()
    assert run.store.moments.has("first.bias") and not run.store.grams.has("first.bias")
    again = sf.open_run(run.path)
    assert "first.bias" in again.build_grams()
    assert all(again.store.moments.has(name) for name in again.parameters if again.parameters[name] < N)


def test_one_that_is_lost_is_named_by_verify_and_made_again(tmp_path):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N)
    before = run.spectrum("parameter")
    (run.path / "done" / "moment-first.bias.json").unlink()
    with pytest.raises(CorruptRunError, match=r"the moment of first\.bias.*is missing; .*--rebuild"):
        run.store.grams.moment("first.bias")
    again = sf.open_run(run.path)
    assert [problem.parameter for problem in verify(again, repair=False)] == ["first.bias"]
    assert again.build_grams() == ["first.bias"]
    after = again.spectrum("parameter")
    assert all(np.array_equal(after.blocks[key].eigenvalues, block.eigenvalues) for key, block in before.blocks.items())


class TwoHeads(tiny_models.TinyRegression):
    """A second head of the same shape."""

    def __init__(self, seed):
        super().__init__(seed)
        self.third = torch.nn.Linear(5, 2)

    def forward(self, x):
        hidden = self.first(x).tanh()
        return self.second(hidden) + self.third(hidden) ** 2


def test_one_of_another_parameter_is_refused(tmp_path):
    model = TwoHeads(0).double()
    data = {key: values.double() for key, values in tiny_models.vectors(N).items()}
    config = sf.SpectralConfig(chunk_size=8, dtype_compute="float64", dtype_model="float64")
    run = sf.collect(model, data, tmp_path / "run.zarr", config=config)
    run.build_grams()
    for kind in ("moment/{}/c/0/0", "done/moment-{}.json"):
        shutil.copy(run.path / kind.format("second.weight"), run.path / kind.format("third.weight"))
    with pytest.raises(CorruptRunError, match=r"not the marker of the moment of third\.weight"):
        sf.open_run(run.path).spectrum("parameter")
