"""Bad input: a message that names the value and the remedy, an exit code, no traceback, and nothing damaged."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_input import (
    BAD_CONFIGS,
    BAD_DATA,
    BAD_MODELS,
    BAD_OPTIONS,
    BAD_SLICES,
    DATA,
    MODEL,
    OTHERS,
    PAGE,
    PYTHON,
    attempt,
    page,
    write,
)
from command_line import arrays, cli, contents

from streamfisher import open_run
from streamfisher.errors import RunError
from streamfisher.runtime import disk
from streamfisher.runtime import memory as host_memory


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a finished run of 6 sequences; copy it before changing anything."""
    run = tmp_path_factory.mktemp("bad_input") / "run.zarr"
    assert cli("run", MODEL, DATA, "--out", run, "--quiet", "--chunk-size", 4) == 0
    return run


def refused(capsys, *arguments, code=2, says=()):
    """Run a command that must fail; check code, message and that no file has changed."""
    before = contents(Path())
    found = cli(*arguments)
    output = capsys.readouterr()
    assert found == code, output.err
    for part in says:
        assert part in output.err, output.err
    assert "Traceback" not in output.err + output.out
    assert contents(Path()) == before
    return output.err


LATE = ("token ids beyond the vocabulary in a late sample", "label beyond the classes")


@pytest.mark.parametrize("case", LATE)
def test_bad_values_in_a_late_sample_are_named(case, capsys):
    make, says = BAD_DATA[case]
    assert cli("run", MODEL, make(), "--out", "run.zarr", "--quiet", "--chunk-size", 4) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in says) and "Traceback" not in message
    assert open_run("run.zarr").info()["samples_done"] == 4


@pytest.mark.parametrize("case", [case for case in BAD_DATA if case not in LATE])
def test_bad_data_is_refused(case, capsys):
    make, says = BAD_DATA[case]
    refused(capsys, "run", MODEL, make(), "--out", "run.zarr", "--quiet", says=says)


@pytest.mark.parametrize("case", BAD_MODELS)
@pytest.mark.parametrize("data", [DATA, "text"])
def test_bad_model_is_refused(case, data, capsys):
    make, says = BAD_MODELS[case]
    data = write("text.txt", "some text that is long enough") if data == "text" else data
    refused(capsys, "run", make(), data, "--out", "run.zarr", "--quiet", "--max-length", 8, says=says)


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option_is_refused(case, capsys):
    options, says = BAD_OPTIONS[case]
    refused(capsys, "run", MODEL, DATA, "--out", "run.zarr", "--quiet", *options, says=says)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_file_is_refused(case, capsys):
    name, text, says = BAD_CONFIGS[case]
    refused(capsys, "run", MODEL, DATA, "--out", "run.zarr", "--quiet", "--config", write(name, text), says=says)


def test_config_file_that_is_not_text_is_refused(tmp_path, capsys):
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    refused(capsys, "run", MODEL, DATA, "--out", "run.zarr", "--config", "a.toml", says=["a.toml", "cannot be parsed"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "MODEL is missing"),
        ((MODEL,), "DATA is missing"),
        ((MODEL, DATA), "--out is missing"),
    ],
)
def test_missing_argument_is_named(arguments, says, capsys):
    refused(capsys, "run", *arguments, says=[says])


def test_folder_that_is_not_a_run_is_left_alone(capsys):
    write("mine/thesis.txt", "years of work")
    refused(capsys, "run", MODEL, DATA, "--out", "mine", "--quiet", says=["mine", "not a streamfisher run", "thesis"])
    for command in ("info", "spectrum", "verify", "gram", "report"):
        refused(capsys, command, "mine", says=["mine", "not a streamfisher run"])


def test_file_as_out_is_left_alone(capsys):
    write("run.zarr", "a file")
    refused(capsys, "run", MODEL, DATA, "--out", "run.zarr", "--quiet", says=["run.zarr", "is a file", "--out"])
    refused(capsys, "info", "run.zarr", says=["run.zarr", "not a streamfisher run"])


def test_out_below_a_file_is_refused(capsys):
    write("note.txt", "a file")
    refused(capsys, "run", MODEL, DATA, "--out", "note.txt/run.zarr", "--quiet", says=["note.txt"])


def test_run_that_does_not_exist_says_how_it_is_made(capsys):
    refused(capsys, "info", "none.zarr", says=["none.zarr", "does not exist", "streamfisher run"])


def test_foreign_zarr_hierarchy_is_left_alone(capsys):
    import zarr

    zarr.open_group("other.zarr", mode="w").create_array("gradients", shape=(3,), dtype="f4")
    refused(capsys, "run", MODEL, DATA, "--out", "other.zarr", "--quiet", says=["other.zarr", "another folder"])


@pytest.mark.parametrize("case", OTHERS)
def test_run_of_something_else_is_not_resumed(case, finished, tmp_path, capsys, monkeypatch):
    import tiny_models

    def one_changed():
        samples = tiny_models.sequences()
        samples[5]["input_ids"][0] += 1
        return samples

    monkeypatch.setattr(tiny_models, "one_changed", one_changed, raising=False)
    shutil.copytree(finished, tmp_path / "run.zarr")
    arguments, says = OTHERS[case]
    message = refused(
        capsys,
        "run",
        *arguments,
        *("--out", "run.zarr", "--quiet", "--chunk-size", 4),
        says=[*says, "cannot be resumed", "--samples 0:5" if case == "number of samples" else "another folder"],
    )
    assert "setting chunk_size" not in message


def test_nan_loss_stops_and_names_the_sample_and_keeps_what_was_before(tmp_path, capsys):
    arguments = ("tiny_models:regression", "tiny_models:vectors_with_nan_in_sample_5", "--out", "run.zarr")
    assert cli("run", *arguments, "--chunk-size", 4, "--quiet") == 3
    message = capsys.readouterr().err
    assert "sample 5" in message and "loss is nan" in message and "--on-nonfinite skip" in message
    assert "Traceback" not in message
    assert open_run(tmp_path / "run.zarr").info()["samples_done"] == 4
    assert cli("spectrum", "run.zarr") == 2
    assert "4 of 8 samples" in capsys.readouterr().err


@pytest.mark.parametrize("sample", [0, 5])
def test_nan_sample_is_skipped_counted_and_named_where_asked_for(sample, tmp_path, capsys):
    data = f"tiny_models:vectors_with_nan_in_sample_{sample}"
    arguments = ("tiny_models:regression", data, "--out", "run.zarr", "--chunk-size", 4, "--quiet")
    assert cli("run", *arguments, "--on-nonfinite", "skip", "--blocks", "none") == 0
    table = capsys.readouterr().out
    assert "N = 7" in table and f"in all: sample {sample}" in table
    content = json.loads((tmp_path / "run.zarr/spectrum.json").read_text())
    assert content["metadata"]["skipped_samples"] == {str(sample): "the loss is nan"}
    assert content["metadata"]["n_samples"] == content["global"]["n_samples"] == 7
    assert cli("info", "run.zarr") == 0
    assert f"sample {sample}: the loss is nan" in capsys.readouterr().out


def test_nan_in_the_first_sample_is_named(tmp_path, capsys):
    arguments = ("tiny_models:regression", "tiny_models:vectors_with_nan_in_sample_0", "--out", "run.zarr")
    assert cli("run", *arguments, "--chunk-size", 4, "--quiet") == 3
    message = capsys.readouterr().err
    assert "sample 0" in message and "nan" in message and "--on-nonfinite skip" in message


def test_skipping_gives_the_spectrum_of_the_data_without_the_sample(tmp_path):
    import tiny_models

    data = tiny_models.vectors(nan_at=5)
    keep = [n for n in range(8) if n != 5]
    np.savez("clean.npz", **{key: value[keep].numpy() for key, value in data.items()})
    options = ("--chunk-size", 4, "--quiet", "--blocks", "none", "--center", "both", "--dtype", "float64")
    bad = "tiny_models:vectors_with_nan_in_sample_5"
    assert cli("run", "tiny_models:regression", bad, "--out", "a", "--on-nonfinite", "skip", *options) == 0
    assert cli("run", "tiny_models:regression", "clean.npz", "--out", "b", *options) == 0
    for center in (False, True):
        skipped, clean = (open_run(name).spectrum("none", center).global_.eigenvalues for name in ("a", "b"))
        np.testing.assert_allclose(skipped, clean, rtol=1e-9, atol=1e-12 * clean[0])


@pytest.mark.parametrize("text", BAD_SLICES)
def test_bad_slice_of_samples_is_refused(text, finished, capsys):
    refused(capsys, "spectrum", finished, "--samples", text, "--quiet", says=BAD_SLICES[text])


def test_disk_without_room_is_found_before_anything_is_created(monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 1000, 1000))
    says = ["Grams of 6 samples", "what is free on the disk", "--gram-per layer"]
    refused(capsys, "run", MODEL, DATA, "--out", "run.zarr", "--quiet", code=5, says=says)


def test_disk_that_fills_up_while_writing_is_no_traceback(monkeypatch, capsys):
    from streamfisher.store import RunStore

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "write_unit", full)
        assert cli("run", MODEL, DATA, "--out", "run.zarr", "--quiet") == 5
    message = capsys.readouterr().err
    assert "No space left" in message and "Traceback" not in message
    assert cli("run", MODEL, DATA, "--out", "run.zarr", "--quiet") == 0


def test_memory_budget_too_small_for_one_panel_is_refused(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run.zarr")
    for marker in (tmp_path / "run.zarr/done").glob("gram-*"):
        marker.unlink()
    says = ["6 samples", "budget is 10 kB", "memory"]
    refused(capsys, "spectrum", "run.zarr", "--memory-budget", "10kB", "--quiet", code=5, says=says)


def test_rows_that_do_not_fit_memory_are_refused(monkeypatch, capsys):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: memory(40_000))
    says = ["embedding.weight alone need 24.6 kB", "leaves 20 kB", "--chunk-size 4 or less", "--exclude"]
    refused(capsys, "run", MODEL, DATA, "--out", "run.zarr", "--quiet", code=5, says=says)


def test_missing_matplotlib_names_the_command_that_installs_it(finished, monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more)
    )
    refused(capsys, "report", finished, "--out", "a.png", "--quiet", says=["pip install 'streamfisher[plots]'"])
    shutil.copytree(finished, tmp_path / "run.zarr")
    (tmp_path / "run.zarr/spectrum.png").unlink()
    assert cli("run", MODEL, DATA, "--out", "run.zarr", "--chunk-size", 4, "--quiet") == 0
    assert "pip install 'streamfisher[plots]'" in capsys.readouterr().out
    assert not (tmp_path / "run.zarr/spectrum.png").exists()


def test_missing_transformers_names_the_command_that_installs_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "transformers" else find(name, *more)
    )
    write("hf/config.json", "{}")
    refused(capsys, "run", "hf", DATA, "--out", "run.zarr", says=["hf", "pip install 'streamfisher[hf]'"])


def test_run_locked_by_another_process_is_refused_and_names_it(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run.zarr")
    program = (
        "import fcntl, json, os, sys\n"
        "file = os.open('run.zarr/lock', os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "os.ftruncate(file, 0)\n"
        "os.pwrite(file, json.dumps({'host': 'elsewhere', 'pid': os.getpid()}).encode(), 0)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        says = ["run.zarr", "being written", f"process {holder.pid} on elsewhere", "wait for it or stop it"]
        refused(capsys, "run", MODEL, DATA, "--out", "run.zarr", "--chunk-size", 4, "--quiet", says=says)
        refused(capsys, "gram", "run.zarr", "--rebuild", "--quiet", says=says)
        holder.stdin.close()
    assert cli("gram", "run.zarr", "--rebuild", "--quiet") == 0


def test_unfinished_run_is_not_analysed(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run.zarr")
    (tmp_path / "run.zarr/done/rows-000001.json").unlink()
    for marker in (tmp_path / "run.zarr/done").glob("gram-*"):
        marker.unlink()
    refused(capsys, "spectrum", "run.zarr", "--quiet", says=["not finished", "4 of 6 samples"])
    before = arrays(finished)
    assert cli("run", MODEL, DATA, "--out", "run.zarr", "--chunk-size", 4, "--quiet") == 0
    assert arrays(tmp_path / "run.zarr") == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', '{"format": "streamfisher-run"}'])
def test_damaged_manifest_is_refused(content, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run.zarr")
    (tmp_path / "run.zarr/manifest.json").write_text(content)
    refused(capsys, "info", "run.zarr", code=4, says=["manifest.json" if "run" not in content else "version"])
    refused(capsys, "run", MODEL, DATA, "--out", "run.zarr", "--quiet", code=4)


@pytest.mark.parametrize(
    ("out", "says"),
    [("no/such/folder/a.png", "no/such/folder"), ("a.bmpp", ".png, .svg or .pdf"), ("picture", ".png, .svg or .pdf")],
)
def test_picture_that_cannot_be_written_is_refused(out, says, finished, capsys):
    refused(capsys, "report", finished, "--out", out, "--quiet", says=[says])


def test_spectrum_into_a_folder_that_does_not_exist_is_refused(finished, capsys):
    refused(capsys, "spectrum", finished, "--out", "no/such/a.json", "--quiet", says=["no/such"])


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(RunError):
        cli("info", tmp_path / "none.zarr", "--debug")


@pytest.mark.parametrize("case", PYTHON)
def test_bad_call_from_python_is_refused(case, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run.zarr")
    code, kind, says = PYTHON[case]
    error = attempt(code)
    assert type(error).__name__ == kind, repr(error)
    assert all(part in str(error) for part in says), error


def test_the_page_of_bad_input_is_what_the_tests_see(finished, tmp_path):
    assert page(finished, tmp_path) == PAGE.read_text(), "python tests/bad_input.py writes it anew"


def test_losses_stay_with_torch_when_nothing_is_deterministic():
    assert not torch.are_deterministic_algorithms_enabled()
