"""Options of commands are those that the config and the command define, by one definition."""

import argparse

import pytest
from command_line import build_parser

from streamfisher import SpectralConfig
from streamfisher.cli.arguments import add_option
from streamfisher.cli.options import OPTIONS, RUN_OPTIONS, read_run_options
from streamfisher.errors import ConfigError

PARSER = build_parser()
COMMANDS = next(action.choices for action in PARSER._actions if action.choices)


def read(*words, base=None):
    return read_run_options(PARSER.parse_args([str(word) for word in words]), base)


def run(*words):
    return read("run", "MODEL", "DATA", "--out", "run.zarr", *words)


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.group])
def test_run_takes_every_option_of_a_group(name):
    action = next(action for action in COMMANDS["run"]._actions if action.dest == name)
    assert action.default is None
    assert action.option_strings == [f"--{(OPTIONS[name].name or name).replace('_', '-')}"]
    assert action.help == OPTIONS[name].description


@pytest.mark.parametrize("command", COMMANDS)
def test_no_two_options_of_a_command_set_the_same(command):
    fields = [action.dest for action in COMMANDS[command]._actions]
    assert len(set(fields)) == len(fields)


def test_options_that_are_not_given_leave_a_stored_config_as_it_is():
    base = SpectralConfig(solver="dense", eps=1e-5, n_workers=3, block_structure="module", center_gradients=True)
    options = read("spectrum", "run.zarr", "--solver", "iterative", base=base)
    assert options.config == base.replace(solver="iterative")
    assert options.structures == ("module",) and options.centers == (True,)


def test_defaults_are_those_of_python():
    options = run()
    assert options.config == SpectralConfig()
    for name, option in RUN_OPTIONS.items():
        if name not in ("model", "data", "out"):
            assert getattr(options, name) == option.default


@pytest.mark.parametrize("key", ["blocks", "block_structure", "block-structure"])
def test_file_names_an_option_as_python_or_the_command_line_does(key, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"{key}: [none, layer]\nworkers: 2\ndtype_gram: float64\ncompute-dtype: float64\ncenter: null\n")
    options = run("--config", path)
    assert options.structures == ("none", "layer") and options.config.block_structure == "none"
    assert options.config == SpectralConfig(
        n_workers=2, dtype_gram="float64", dtype_compute="float64", block_structure="none"
    )


def test_name_that_is_nearly_one_of_the_command_line_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("worker: 2\n")
    with pytest.raises(ConfigError, match=r"'worker' is not a known option. Did you mean workers"):
        run("--config", tmp_path / "a.yaml")


def test_switch_in_a_file_must_be_one(tmp_path):
    (tmp_path / "a.yaml").write_text("fsdp: perhaps\n")
    with pytest.raises(ConfigError, match="fsdp='perhaps' must be true or false"):
        run("--config", tmp_path / "a.yaml")


def test_per_cent_in_a_help_text_is_shown(monkeypatch):
    import dataclasses

    monkeypatch.setitem(OPTIONS, "seed", dataclasses.replace(OPTIONS["seed"], help="100 % random"))
    parser = argparse.ArgumentParser()
    add_option(parser, "seed")
    assert "100 % random (default: 42)" in parser.format_help()
