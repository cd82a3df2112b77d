"""A run says all that it was made with, and is made once more from that, byte for byte."""

import json
import shutil

import pytest
import tiny_models
import yaml
from command_line import cli, contents

import streamfisher as sf

MODEL, DATA = "tiny_models:causal", "tiny_models:sequences"
LINE = ("run", MODEL, DATA, "--quiet", "--samples", 5, "--chunk-size", 2, "--blocks", "module,none,blocks.yaml")
LINE += ("--center", "both", "--store-dtype", "float64", "--exclude", "norm.*", "--memory-budget", "1GB", "--top-k", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    (folder / "blocks.yaml").write_text("'head.*': end\n'*': rest\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli(*LINE, "--out", "run.zarr") == 0
    (folder / "blocks.yaml").unlink()  # the run has its contents
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def files(run):
    return {name: data for name, data in contents(run).items() if name not in ("spectrum.png", "report.html")}


@pytest.mark.parametrize(
    "words",
    [("run", "--config", "run.zarr/config.yaml", "--out", "a.zarr"), ("replay", "run.zarr", "--out", "b.zarr")],
    ids=["run --config", "replay"],
)
def test_a_run_is_made_once_more_byte_for_byte(words, folder):
    assert cli(*words, "--quiet") == 0
    before, again = files(folder / "run.zarr"), files(folder / words[-1])
    assert again.keys() == before.keys()
    assert [name for name in before if again[name] != before[name]] == []


def test_the_file_has_every_option_by_its_name(folder):
    values = yaml.safe_load((folder / "run.zarr/config.yaml").read_text())
    assert (values["model"], values["data"], values["samples"], values["center"]) == (MODEL, DATA, 5, "both")
    assert values["blocks"] == ["module", "none", {"head.*": "end", "*": "rest"}]
    assert set(sf.SpectralConfig.names()) - values.keys() == {"block_structure", "center_gradients"}
    assert cli("run", "--config", "run.zarr/config.yaml", "--out", "run.zarr", "--quiet") == 0  # and resumes the run


def test_a_run_of_python_has_its_config_and_no_names_to_replay(tmp_path, capsys):
    config = sf.SpectralConfig(chunk_size=4, seed=7)
    sf.collect(tiny_models.causal(), tiny_models.sequences(), tmp_path / "run.zarr", config=config)
    values = yaml.safe_load((tmp_path / "run.zarr/config.yaml").read_text())
    assert sf.SpectralConfig.from_dict(values) == config
    assert cli("replay", tmp_path / "run.zarr", "--out", tmp_path / "again.zarr") == 2
    assert "names no MODEL and DATA" in capsys.readouterr().err


def test_code_of_a_checkpoint_is_run_again_only_if_asked(tmp_path, capsys):
    assert cli("collect", MODEL, DATA, "--out", tmp_path / "run.zarr", "--quiet", "--trust-remote-code") == 0
    assert cli("replay", tmp_path / "run.zarr", "--out", tmp_path / "again.zarr") == 2
    assert "give it again if you do trust" in capsys.readouterr().err
    assert cli("replay", tmp_path / "run.zarr", "--out", tmp_path / "again.zarr", "--trust-remote-code") == 0


def test_a_file_that_says_something_else_is_found_and_mended(folder, tmp_path, capsys):
    run = tmp_path / "run.zarr"
    shutil.copytree(folder / "run.zarr", run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 42", "seed: 43"))
    assert cli("verify", run, "--json") == 4
    assert [problem["what"] for problem in json.loads(capsys.readouterr().out)] == ["config"]
    assert cli("verify", run, "--repair") == 4
    assert (run / "config.yaml").read_text() == text


def test_a_run_that_grows_says_its_new_number_of_samples(folder, tmp_path):
    run = tmp_path / "run.zarr"
    assert cli("collect", MODEL, DATA, "--out", run, "--quiet", "--samples", 3) == 0
    assert cli("collect", MODEL, DATA, "--out", run, "--quiet", "--samples", 6) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["samples"] == 6
    assert cli("verify", run, "--quiet") == 0
