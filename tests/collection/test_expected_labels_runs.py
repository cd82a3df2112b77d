"""Runs with labels='expected' are runs like others: held, in waves, on ranks, streamed, resumed, grown, analysed."""

import numpy as np
import pytest
import torch
from command_line import cli
from forked_commands import forked
from rank_models import classifier_in_float64, eleven_labelled_vectors
from rank_processes import bytes_of, command, finished
from torch import nn

import streamfisher as sf
from streamfisher.analysis import bootstrap
from streamfisher.errors import CapacityError, ConfigError, LossError, RunMismatchError

N, C = 11, 4
EXPECTED = ("--labels", "expected", "--chunk-size", "4")


def config(**options):
    return sf.SpectralConfig(**({"labels": "expected", "chunk_size": 6, "dtype_compute": "float64"} | options))


def collected(path, n=None, data=None, **options):
    data = eleven_labelled_vectors() if data is None else data
    return sf.collect(classifier_in_float64(), data, path, config=config(**options), n_samples=n)


def values(run, **options):
    return run.spectrum("none", **options).global_.eigenvalues


@pytest.mark.parametrize(
    "options",
    [
        {"keep_gradients": "none", "hold": "host"},
        {"keep_gradients": "none", "disk_budget": "70KB", "hold": "disk", "codec": "raw"},
        {"representation": "dense", "gram_per": "layer"},
        {"chunk_size": 5},
    ],
    ids=str,
)
def test_held_in_waves_or_streamed_the_spectrum_is_the_same(tmp_path, options):
    run, other = collected(tmp_path / "one.zarr"), collected(tmp_path / "other.zarr", **options)
    np.testing.assert_allclose(values(other), values(run), rtol=1e-9, atol=1e-15)
    assert "disk_budget" not in options or len(other.store.waves) > 1


class Stacked(nn.Module):
    """A classifier that is a stack of layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layers = nn.Linear(3, 5), nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, C)

    def forward(self, input):
        x = self.first(input)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize("k", [None, 2])
def test_a_stream_of_layers_gives_what_the_whole_model_does(tmp_path, k):
    found = [
        sf.collect(
            Stacked().double(),
            eleven_labelled_vectors(),
            tmp_path / f"{stream}.zarr",
            config=config(stream=stream, classes_per_sample=k),
        )
        for stream in ("none", "layers")
    ]
    assert found[1].manifest.layout["streamed"] and not found[0].manifest.layout["streamed"]
    np.testing.assert_allclose(values(found[1]), values(found[0]), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("more", [(), ("--classes-per-sample", "2"), ("--keep-gradients", "none")], ids=str)
def test_any_number_of_ranks_gives_the_bytes_of_one(tmp_path, more):
    found = []
    for count in (1, 2):
        out = tmp_path / f"{count}.zarr"
        finished(forked(count, command(out, "classifier_in_float64", "eleven_labelled_vectors", *EXPECTED, *more)))
        found.append(bytes_of(out))
    assert found[0] == found[1]


def test_a_stopped_run_goes_on_with_the_classes_that_it_began_with(tmp_path, monkeypatch):
    run = collected(tmp_path / "run.zarr", classes_per_sample=2)
    before = run.store.grams.read("0.weight")[0] if run.build_grams() else None
    run.store.forget_unit(run.store.units[-1])
    for name in run.parameters:
        run.store.grams.forget(name)

    def otherwise(self, dim=-1):  # as another machine might round it
        return torch.ones_like(self) / self.shape[dim]

    monkeypatch.setattr(torch.Tensor, "softmax", otherwise)
    again = collected(tmp_path / "run.zarr", classes_per_sample=2)
    monkeypatch.undo()
    again.build_grams()
    np.testing.assert_array_equal(again.store.grams.read("0.weight")[0], before)
    with pytest.raises(RunMismatchError, match="classes_per_sample: 2 in the run, 3 now"):
        collected(tmp_path / "run.zarr", classes_per_sample=3)
    assert sf.verify(again, deep=9, model=classifier_in_float64(), samples=eleven_labelled_vectors()) == []


@pytest.mark.parametrize("k", [None, 2])
def test_a_grown_run_is_one_from_scratch(tmp_path, k):
    run = collected(tmp_path / "run.zarr", 7, classes_per_sample=k)
    assert run.n_samples == 7 * (k or C)
    run = run.add(classifier_in_float64(), eleven_labelled_vectors())
    whole = collected(tmp_path / "whole.zarr", classes_per_sample=k)
    assert run.manifest.data["n_inputs"] == N
    np.testing.assert_allclose(values(run), values(whole), rtol=1e-12, atol=1e-16)
    assert run.spectrum("none").metadata["left_out_probability"] == whole.metadata()["left_out_probability"]


def test_subsets_weights_and_tokens_divide_by_inputs(tmp_path):
    run, first = collected(tmp_path / "run.zarr"), collected(tmp_path / "first.zarr", 5)
    np.testing.assert_allclose(values(run, samples=slice(0, 5 * C)), values(first), rtol=1e-9, atol=1e-15)
    weights = np.repeat(np.arange(N, dtype=float), C)
    rows = np.concatenate([run.store.rows.columns(name, 0, size) for name, size in run.parameters.items()], axis=1)
    F = (rows * weights[:, None]).T @ rows / np.arange(N).sum()
    truth = np.linalg.eigvalsh(F)[::-1]
    np.testing.assert_allclose(values(run, weights=weights)[:20], truth[:20], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(values(run, normalization="tokens"), values(run), rtol=1e-12)


def test_intervals_and_growth_take_all_classes_of_an_input_or_none(tmp_path):
    run = collected(tmp_path / "run.zarr")
    growth = run.growth("none", sizes=[4, N])
    assert growth.sizes == (4, N) and [s.metadata["n_samples"] for s in growth.spectra] == [4 * C, N * C]
    # with the classes of one input alike, leaving inputs out is what another run of data would give
    found = run.spectrum("none", bootstrap=200).bootstrap
    assert found.n_left_out == 1
    grams = run.block_grams("none")
    traces = np.add.reduceat(grams.gram("global").diagonal(), np.arange(0, N * C, C)) / C
    jackknife = np.std(np.log((traces.sum() - traces) / (N - 1)), ddof=0) * np.sqrt(N - 1)
    drawn = bootstrap.bootstrap(grams, run.spectrum("none"), 4000, metrics=["trace"]).blocks["global"]
    assert np.log(drawn.values["trace"]).std(ddof=1) * drawn.inflation == pytest.approx(jackknife, rel=0.05)


def test_samples_and_influence_name_inputs_and_classes(tmp_path, capsys):
    run = collected(tmp_path / "run.zarr")
    found = run.samples(top=3)
    assert found.fields["class"].tolist() == list(range(C)) * N and len(found.samples) == N * C
    # over all samples the leverages add up to the effective dimension of F, normalised by inputs
    np.testing.assert_allclose(found.leverages.sum(axis=1), found.effective_dimensions, rtol=1e-9)
    rows = np.concatenate([run.store.rows.columns(name, 0, size) for name, size in run.parameters.items()], axis=1)
    F = rows[C:].T @ rows[C:] / (N - 1)
    scores = run.influence(slice(0, C), 1e-2, block_structure="none").blocks["global"].damped[0]
    truth = rows[:C] @ np.linalg.solve(F + 1e-2 * np.eye(len(F)), rows[C:].T)
    np.testing.assert_allclose(scores, truth, rtol=1e-8, atol=1e-12)
    assert cli("samples", run.path, "--samples", "class==2") == 0
    assert "class 2" in capsys.readouterr().out


def test_in_one_call_as_in_a_run(tmp_path):
    found = sf.FisherSpectral(config=config(block_structure="none")).compute_fisher_spectrum(
        classifier_in_float64(), eleven_labelled_vectors()
    )
    run = collected(tmp_path / "run.zarr")
    np.testing.assert_allclose(found["global"]["top_eigenvalues"], values(run)[:100], rtol=1e-9, atol=1e-15)
    assert found["metadata"]["normalization"] == run.spectrum("none").metadata["normalization"]


def test_from_the_command_line_and_planned(tmp_path, capsys):
    where = ("rank_models:classifier_in_float64", "rank_models:eleven_labelled_vectors")
    assert cli("plan", *where, "--labels", "expected", "--json") == 0
    planned = capsys.readouterr().out
    assert f'"n_samples": {N * C}' in planned, planned
    out = tmp_path / "run.zarr"
    assert cli("run", *where, "--out", out, *EXPECTED, "--classes-per-sample", 3, "--blocks", "none", "--quiet") == 0
    assert cli("info", out) == 0
    assert "3 of 4 classes" in capsys.readouterr().out


def test_what_cannot_be_had_is_refused_by_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="set labels='expected'"):
        sf.SpectralConfig(classes_per_sample=2)
    with pytest.raises(ConfigError, match="center_gradients=True and labels='expected' do not go together"):
        config(center_gradients=True)
    with pytest.raises(ConfigError, match="classes_per_sample=5 and the model has 4 classes"):
        collected(tmp_path / "a.zarr", classes_per_sample=5)
    data = eleven_labelled_vectors()
    with pytest.raises(LossError, match="the loss 'regression' is of a Gaussian, which has no classes"):
        collected(tmp_path / "b.zarr", data={**data, "labels": torch.randn(N, 4, dtype=torch.float64)})
    with pytest.raises(LossError, match="is of no probabilities of classes"):
        sf.collect(
            classifier_in_float64(), data, tmp_path / "c.zarr", config=config(), loss=lambda m, b: m(b["input"]).sum(1)
        )
    many = {key: value.repeat_interleave(60, 0) for key, value in data.items()}
    with pytest.raises(
        CapacityError, match=r"2,640 samples of 660 inputs and 4 of 4 classes: .*--classes-per-sample 2 fits"
    ):
        collected(tmp_path / "d.zarr", data=many, memory_budget="20MB")
    run = collected(tmp_path / "e.zarr")
    with pytest.raises(ConfigError, match="has no covariance"):
        run.spectrum("none", center=True)
