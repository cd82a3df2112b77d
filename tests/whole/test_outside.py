"""A run from elsewhere that holds links or FIFOs: every command refuses it, and nothing outside is touched."""

import os
import shutil

import pytest
from command_line import cli
from tiny_runs import make_run

from streamfisher import open_run
from streamfisher.errors import CorruptRunError
from streamfisher.store import RunStore


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("outside") / "run.zarr", store_centered=True)
    run.eigenvectors("global", 2, block_structure="none")
    return run.path


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    (folder / "global").mkdir(parents=True)
    for name in ("precious", "global/precious", "zarr.json", "a.partial"):
        (folder / name).write_text('{"not": "yours"}')
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMMANDS = [
    ("info",),
    ("verify", "--quiet"),
    ("verify", "--repair", "--quiet"),
    ("spectrum", "--quiet"),
    ("spectrum", "--quiet", "--gram-dtype", "float64"),
    ("gram", "--rebuild", "--quiet"),
    ("report", "--quiet"),
    ("density", "--block", "layer_0", "--quiet"),
    ("eigenvectors", "--block", "global", "--blocks", "none", "--top", "1", "--overwrite", "--quiet"),
]
FOLDERS = ["fields", "eigenvectors", "done/eigenvectors", "done/results", "gram", "gram_mean", "moment", "samples"]
FOLDERS += ["gradients", "done", "mean_parts", "factors", "done/tiles-first.weight"]
FILES = ["lock", "lock.ranks", "log.jsonl", "report.html", "spectrum.png", "spectrum.json", "manifest.copy.json"]
FILES += ["done/rows-000000.json", "done/mean.json", "x.partial", "gradients/first.weight/c/0/0", "zarr.json"]


@pytest.mark.parametrize("where", [*FOLDERS, *FILES])
def test_no_command_reads_writes_or_deletes_through_a_link(where, run, outside, capsys):
    place = run / where
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    place.symlink_to(outside if where in FOLDERS else outside / "precious")
    before, inside = contents(outside), contents(run)
    for command, *options in COMMANDS:
        assert cli(command, run, *options) == 4, command
        assert "is a link" in capsys.readouterr().err
    assert contents(outside) == before and contents(run) == inside


@pytest.mark.parametrize("where", ["manifest.json", "lock", "log.jsonl", "done/rows-000000.json", "samples/fifo"])
def test_a_fifo_holds_nobody_up(where, run, capsys):
    (run / where).unlink(missing_ok=True)
    os.mkfifo(run / where)
    for command, *options in COMMANDS:
        assert cli(command, run, *options) in (2, 4), command
    assert cli("info", run, "--watch", "--interval", "0.01") in (2, 4) or where == "samples/fifo"


def test_a_run_that_is_itself_a_link_is_a_run(run, tmp_path):
    (tmp_path / "elsewhere.zarr").symlink_to(run)
    assert cli("verify", tmp_path / "elsewhere.zarr", "--quiet") == 0
    assert cli("spectrum", tmp_path / "elsewhere.zarr", "--quiet") == 0


def test_a_worker_does_not_look_over_the_whole_run_again(run, monkeypatch):
    import pickle

    store = RunStore(run)
    monkeypatch.setattr("streamfisher.store.run_store.require_own_files", lambda path: 1 / 0)
    assert pickle.loads(pickle.dumps(store)).path == run


def test_what_is_laid_into_an_open_run_is_not_written_through(run, outside):
    opened = open_run(run)
    shutil.rmtree(run / "gram")
    (run / "gram").symlink_to(outside)
    before = contents(outside)
    with pytest.raises(CorruptRunError, match="is a link"):
        opened.rebuild_grams()
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["lock", "log.jsonl"])
def test_what_is_written_in_place_has_no_name_elsewhere(name, run, tmp_path, capsys):
    (tmp_path / "outside").write_bytes((run / name).read_bytes())
    (run / name).unlink()
    os.link(tmp_path / "outside", run / name)
    before = (tmp_path / "outside").stat()
    if name == "lock":
        assert cli("gram", run, "--rebuild", "--quiet") == 4 and "hard link" in capsys.readouterr().err
    else:  # a log stops nobody
        with pytest.warns(UserWarning, match="hard link"):
            assert cli("gram", run, "--rebuild", "--quiet") == 0
    after = (tmp_path / "outside").stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
