"""`verify --deep`: a run that is intact by all its checksums, held against what the model gives."""

import dataclasses
import re

import numpy as np
import pytest
import tiny_models
import torch
from command_line import cli
from llama_runs import budget, collected
from tiny_runs import make_run

import streamfisher as sf
from streamfisher import verify
from streamfisher.errors import ConfigError, RunMismatchError
from streamfisher.store import UnitRecord


def regression(n=24):
    return {name: values.double() for name, values in tiny_models.vectors(n).items()}


def model():
    return tiny_models.TinyRegression().double()


def rewrite(run, change, index=1):
    """Write a unit again through the store, altered, so that every checksum and marker is that of the wrong one."""
    store, unit = run.store, run.store.units[index]
    where = slice(unit.start, unit.stop)
    names = list(store.parameters)
    norms = store.samples.per_sample("squared_norm")[where]
    record = UnitRecord(
        unit,
        {name: torch.from_numpy(store.rows.columns(name, 0, store.parameters[name], where)) for name in names},
        store.samples.per_sample("loss")[where],
        store.samples.per_sample("n_targets")[where],
        {name: norms[:, column] for column, name in enumerate(names)},
        {},
    )
    store.write_unit(change(record))


@pytest.mark.parametrize("options", [{}, {"dtype_store": "bfloat16"}, {"store_centered": True}, {"labels": "model"}])
def test_an_intact_run_of_rows_is_what_the_model_gives(tmp_path, options):
    if "labels" in options:
        data, net = tiny_models.sequences(6), tiny_models.causal()
        run = sf.collect(net, data, tmp_path / "run.zarr", config=sf.SpectralConfig(chunk_size=4, **options))
    else:
        data, net = regression(), model()
        run = make_run(tmp_path / "run.zarr", **options)
    run.spectrum("module")
    assert verify(run, deep=7, model=net, samples=data) == []


def llama_and_sequences():
    from factored_models import llama, sequences

    return llama().double(), sequences()


@pytest.mark.slow
@pytest.mark.parametrize("representation", ["dense", "factors"])
def test_an_intact_run_of_waves_is_what_the_model_gives(tmp_path, representation):
    whole = collected(tmp_path / "whole.zarr", representation=representation)
    run = collected(tmp_path / "run.zarr", representation=representation, disk_budget=budget(whole))
    net, data = llama_and_sequences()
    assert len(run.store.waves) > 2 and run.info()["gradients_deleted"] == list(run.parameters)
    assert verify(whole, deep=5, model=net, samples=data) == []
    assert verify(run, deep=5, model=net, samples=data) == []


@pytest.mark.slow
def test_a_wrong_gram_of_deleted_gradients_is_named_and_made_again(tmp_path):
    run = collected(tmp_path / "run.zarr", representation="factors", keep_gradients="none")
    net, data = llama_and_sequences()
    name = "model.norm.weight"
    gram, products = run.store.grams.read(name)
    settings = {"dtype_gram": "float32"} | run.store.grams.marker(name)["settings"]
    wrong = gram.copy()
    wrong[2, 7] = wrong[7, 2] = gram[2, 7] + 0.01 * np.sqrt(gram[2, 2] * gram[7, 7])
    run.store.grams.write(name, wrong, products, settings)
    assert verify(run) == []
    (problem,) = verify(run, deep=11, model=net, samples=data, repair=True)
    assert str(problem) == f"gram of {name}, samples 2 to 7: not what the model gives: a relative difference of 1.0e-02"
    again = collected(tmp_path / "run.zarr", representation="factors", keep_gradients="none")
    assert np.array_equal(again.store.grams.read(name)[0], gram)


def with_wrong_row(record):
    record.rows["second.weight"][3] *= 1.001
    return record


def with_exchanged_rows(record):
    record.rows["first.bias"][[0, 3]] = record.rows["first.bias"][[3, 0]]
    return record


def with_wrong_loss(record):
    losses = record.losses.copy()
    losses[3] += 0.5
    return dataclasses.replace(record, losses=losses)


def with_wrong_norm(record):
    norms = {name: values.copy() for name, values in record.squared_norms.items()}
    norms["first.weight"][3] *= 1.21
    return dataclasses.replace(record, squared_norms=norms)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (with_wrong_row, "rows of second.weight, samples 11 to 11: not what the model gives: .* 1.0e-03"),
        (with_exchanged_rows, "rows of first.bias, samples (8 to 8|11 to 11): not what the model gives"),
        (with_wrong_loss, "loss, samples 11 to 11: not what the model gives"),
        (with_wrong_norm, "squared_norm of first.weight, samples 11 to 11: not what the model gives: .* 1.0e-01"),
    ],
)
def test_what_was_written_wrong_with_right_checksums_is_named_and_computed_again(tmp_path, change, expected):
    run = make_run(tmp_path / "run.zarr")
    right = {name: run.store.rows.columns(name, 0, size) for name, size in run.parameters.items()}
    rewrite(run, change)
    run = sf.open_run(run.path)
    assert verify(run) == []
    problems = verify(run, deep=24, model=model(), samples=regression(), repair=True)

    assert problems and all(re.match(expected, str(problem)) for problem in problems), list(map(str, problems))
    run = make_run(run.path)
    assert all(np.array_equal(run.store.rows.columns(name, 0, run.parameters[name]), right[name]) for name in right)
    assert verify(run, deep=24, model=model(), samples=regression()) == []


def test_the_choice_of_samples_is_that_of_the_seed(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    rewrite(run, with_wrong_row)
    run = sf.open_run(run.path)
    found = [len(verify(run, deep=6, model=model(), samples=regression(), seed=s)) for s in range(5)]
    assert set(found) == {0, 1}
    assert found[0] == len(verify(run, deep=6, model=model(), samples=regression(), seed=0))


def test_another_model_or_other_data_are_refused(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    with pytest.raises(RunMismatchError, match="the same parameters with other values"):
        verify(run, deep=2, model=tiny_models.TinyRegression(1).double(), samples=regression())
    with pytest.raises(RunMismatchError, match="samples 8 to 15 have other contents"):
        data = regression()
        data["x"][9] += 1
        verify(run, deep=2, model=model(), samples=data)
    with pytest.raises(ConfigError, match="takes model= and samples="):
        verify(run, deep=2)
    with pytest.raises(ConfigError, match="deep=0 must be a whole number"):
        verify(run, deep=0, model=model(), samples=regression())


def test_the_command_line_compares_and_refuses(tmp_path, capsys):
    path, data = tmp_path / "run.zarr", "tiny_models:sequences"
    assert cli("collect", "tiny_models:causal", data, "--out", path, "--quiet") == 0
    assert cli("verify", path, "tiny_models:causal", data, "--deep", 3, "--quiet") == 0
    assert "3 random samples are what the model gives" in capsys.readouterr().out
    assert cli("verify", path, "tiny_models:causal_with_other_values", data, "--deep", 3, "--quiet") == 2
    assert "cannot be verified with these" in capsys.readouterr().err
    assert cli("verify", path, "--deep", 3, "--quiet") == 2
    assert "MODEL is missing" in capsys.readouterr().err

    def altered(record):
        record.rows["head.bias"][:] *= 2
        return record

    rewrite(sf.open_run(path), altered, index=0)
    assert cli("verify", path, "--quiet", "--dry-run") == 0
    capsys.readouterr()
    assert cli("verify", path, "tiny_models:causal", data, "--deep", 3, "--quiet", "--dry-run") == 4
    assert "rows of head.bias, samples" in capsys.readouterr().out
