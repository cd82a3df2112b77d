"""Samples are selected by what the data, or the run, says of each of them; and a run takes further samples."""

import json

import numpy as np
import pytest
import torch
from command_line import cli

import streamfisher as sf


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randn(3, generator=generator),
            "labels": torch.tensor(i % 2),
            "source": torch.tensor(i // 4),
        }
        for i in range(12)
    ]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


@pytest.fixture
def run(model, data, tmp_path):
    return sf.collect(model, data, tmp_path / "run.zarr", config=sf.SpectralConfig(chunk_size=5))


def test_scalars_of_the_data_become_fields(run):
    fields = run.store.samples.fields()
    assert fields["source"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert fields["labels"].tolist() == [0, 1] * 6
    np.testing.assert_array_equal(fields["loss"], run.losses)


@pytest.mark.parametrize(("condition", "selected"), [("source>=1", slice(4, 12)), ("source == 1", slice(4, 8))])
def test_a_condition_selects_on_the_command_line(run, condition, selected, capsys):
    assert cli("spectrum", run.path, "--samples", condition, "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["global"] == json.loads(json.dumps(run.spectrum(samples=selected).to_dict()["global"]))


def test_an_unknown_field_is_refused_with_those_there_are(run, capsys):
    assert cli("spectrum", run.path, "--samples", "sauce>1", "--quiet") == 2
    assert "no field 'sauce'; it has loss, n_targets, labels, source" in capsys.readouterr().err


def test_a_condition_that_nothing_meets_is_refused(run, capsys):
    assert cli("spectrum", run.path, "--samples", "source>7", "--quiet") == 2
    assert "selects 0 of the run's 12 samples" in capsys.readouterr().err


def test_adding_samples_computes_what_is_new_and_ends_where_one_go_would(model, data, tmp_path):
    config = sf.SpectralConfig(chunk_size=4, use_deterministic=True)
    whole = sf.collect(model, data, tmp_path / "whole.zarr", config=config)
    run = sf.collect(model, data, tmp_path / "run.zarr", config=config, n_samples=8)
    run.spectrum()
    first = {path: path.stat().st_mtime_ns for path in (run.path / "done").glob("rows-*")}
    run = run.add(model, data)
    assert run.n_samples == 12
    assert all(path.stat().st_mtime_ns == before for path, before in first.items())
    assert run.spectrum().to_dict()["per_block"] == whole.spectrum().to_dict()["per_block"]
    assert run.store.samples.fields()["source"].tolist() == whole.store.samples.fields()["source"].tolist()
