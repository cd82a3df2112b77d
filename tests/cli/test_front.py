"""`streamfisher --help` answers at once, and says what the commands' own parsers say."""

import subprocess
import sys

import pytest
from command_line import build_parser

from streamfisher.cli.commands import COMMANDS
from streamfisher.cli.front import main

LIGHT = """
import sys
import streamfisher
from streamfisher.cli.front import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
heavy = {"torch", "numpy", "accelerate", "zarr", "dask"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_it_imports_nothing_heavy(word):
    ended = subprocess.run([sys.executable, "-c", LIGHT, word], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "streamfisher" in ended.stdout


def test_help_is_that_of_all_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == build_parser().format_help()
    commands = next(action.choices for action in build_parser()._actions if action.choices)
    assert list(commands) == list(COMMANDS)


@pytest.mark.parametrize("words", [[], ["colect"], ["--samples", "3"]])
def test_words_that_are_no_command_end_with_the_known_ones(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory"),
        OSError("libgomp.so.1: failed to map segment from shared object"),
        ImportError("/lib/_backend_agg.so: failed to map segment from shared object"),
        SystemError("error return without exception set"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_is_said_whatever_ran_out_of_it(error, monkeypatch, capsys):
    def ends(arguments):
        raise error

    monkeypatch.setattr("streamfisher.cli.main.print_info", lambda run, arguments: ends(arguments))
    monkeypatch.setattr("streamfisher.open_run", lambda path: None)
    code = main(["info", "run.zarr"])
    assert code == 5, capsys.readouterr().err
    assert "no memory is left" in capsys.readouterr().err


def test_an_import_that_fails_for_another_reason_is_not_hidden(monkeypatch):
    def ends(run, arguments):
        raise ImportError("no module named x")

    monkeypatch.setattr("streamfisher.cli.main.print_info", ends)
    monkeypatch.setattr("streamfisher.open_run", lambda path: None)
    with pytest.raises(ImportError, match="no module named x"):
        main(["info", "run.zarr"])
