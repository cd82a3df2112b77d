"""A run is written below a URL as into a folder: whatever stops it, what its markers say is there, and it goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tiny_models
from command_line import cli
from s3_server import bucket, s3_server
from tiny_runs import make_run

import streamfisher as sf
from streamfisher.errors import ConfigError, RemoteError, RunError, StoppedError
from streamfisher.runtime import staging as staging_module
from streamfisher.runtime import upload
from streamfisher.store import open_eigenvectors, written

URL = "memory://bucket/run.zarr"
KINDS = {
    "dense": {"representation": "dense"},
    "factors": {"representation": "factors"},
    "centered": {"store_centered": True},
    "deleted": {"keep_gradients": ["none"], "hold": "disk"},
}


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield store
    store.store.clear()


def stored(store, root="/bucket/run.zarr"):
    """Return the objects below the URL, without log and turns of writers."""
    names = [name.removeprefix(f"{root}/") for name in store.find(root)]
    return {name: store.cat(f"{root}/{name}") for name in names if not name.startswith(("writers/", "log.jsonl"))}


def files(run):
    """Return the files of a local run, without log and locks."""
    names = [path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()]
    return {name: (run.path / name).read_bytes() for name in names if not name.startswith(("lock", "log.jsonl"))}


def arrays(contents):
    """Return the chunks of a run: what it is of, without settings that name workers or the time."""
    return {name: content for name, content in contents.items() if "/c/" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_below_a_url_has_the_files_of_a_local_one(kind, memory, tmp_path):
    here = make_run(tmp_path / "here" / "run.zarr", **KINDS[kind])
    here.build_grams()
    far = make_run(URL, **KINDS[kind])
    assert stored(memory) == files(here)
    assert str(far.path) == URL and sf.verify(far) == []
    assert not (tmp_path / "run.zarr.staging").exists()


@pytest.mark.parametrize("kind", ["dense", "factors", "centered"])
def test_chunks_that_were_sent_are_freed_and_read_from_there(kind, memory, tmp_path, monkeypatch):
    """A staging folder of a few bytes: nearly every chunk of gradients is freed as soon as it is sent."""
    here = make_run(tmp_path / "here" / "run.zarr", **KINDS[kind])
    here.build_grams()
    freed, plain = [], staging_module.Staging.free
    monkeypatch.setattr(staging_module.Staging, "free", lambda self, name: freed.append(name) or plain(self, name))
    with written(URL, budget=1) as folder:
        run = make_run(folder, **KINDS[kind])
        assert freed and not all((folder / name).exists() for name in freed)
        run.build_grams()
    assert arrays(stored(memory)) == arrays(files(here))
    assert sf.verify(sf.open_run(URL)) == []


def test_gradients_that_are_deleted_here_are_deleted_there(memory):
    with written(URL, budget=1) as folder:
        make_run(folder, keep_gradients=["none"], hold="disk", representation="dense")
    assert not [name for name in stored(memory) if name.startswith("gradients/") and "/c/" in name]
    assert sf.verify(sf.open_run(URL)) == []


def test_more_samples_are_added_below_a_url(memory, tmp_path):
    data, model = tiny_models.vectors(28), tiny_models.TinyRegression(0)

    def collect(path, n_samples):
        run = sf.collect(model, data, path, config=sf.SpectralConfig(chunk_size=8), n_samples=n_samples)
        run.build_grams()
        return run

    collect(tmp_path / "here" / "run.zarr", 20)
    here = collect(tmp_path / "here" / "run.zarr", 28)
    collect(URL, 20)
    before = stored(memory)
    far = collect(URL, 28)
    assert arrays(stored(memory)) == arrays(files(here))
    assert far.n_samples == 28 and sf.verify(far) == []
    kept = [name for name in arrays(before) if name.startswith("gradients/") and "/c/0/" in name]
    assert all(stored(memory)[name] == before[name] for name in kept)


def test_a_second_run_of_the_same_writes_nothing_anew(memory, monkeypatch):
    make_run(URL)
    put, plain = [], type(memory).pipe_file
    monkeypatch.setattr(
        type(memory),
        "pipe_file",
        lambda self, path, *more, **options: put.append(path) or plain(self, path, *more, **options),
    )
    make_run(URL)
    assert {path.rpartition("run.zarr/")[2].split("/")[0] for path in put} <= {"writers", "log.jsonl"}


def test_a_second_writer_is_refused_and_told_of_the_first(memory, tmp_path):
    with written(URL):
        with pytest.raises(RunError, match=rf"is being written by process {os.getpid()} on "):
            make_run(URL, seed=3)
        with pytest.raises(RunError, match="is being written by"), written(URL, staging=tmp_path / "other"):
            pass


def test_a_marker_that_somebody_else_wrote_is_not_replaced(memory):
    """Two writers without a lock: the markers themselves are put under the condition that there are none."""
    with pytest.raises(RunError, match="was written by another process"), written(URL, locked=False) as folder:
        memory.pipe_file("/bucket/run.zarr/done/rows-000001.json", b"{}")
        make_run(folder)
    assert memory.cat("/bucket/run.zarr/done/rows-000001.json") == b"{}"


def test_commands_write_below_a_url(memory, tmp_path, capsys):
    make_run(URL)
    before = stored(memory)
    assert cli("gram", URL, "--rebuild", "--quiet") == 0
    assert "bit-identical" in capsys.readouterr().out
    assert arrays(stored(memory)) == arrays(before)
    command = ["run", "streamfisher.demo:load_demo_model", "streamfisher.demo:demo_dataset", "--samples", "4"]
    command += ["--max-length", "16", "--chunk-size", "2", "--quiet", "--out", "memory://bucket/demo.zarr"]
    assert cli(*command, "--staging", "here", "--staging-budget", "1MB") == 0
    assert "The run is at memory://bucket/demo.zarr" in capsys.readouterr().err
    far = sf.open_run("memory://bucket/demo.zarr")
    assert sf.verify(far) == [] and far.info()["grams_done"] == far.info()["n_grams"]
    assert (far.path / "spectrum.json").is_file()
    assert not Path("here").exists()
    assert cli("info", "memory://bucket/demo.zarr") == 0


def test_commands_repair_runs_below_a_url_and_put_eigenvectors_there(memory, tmp_path, capsys):
    make_run(URL)
    name = "/bucket/run.zarr/gram/first.weight/c/0/0"
    right = memory.cat(name)
    memory.pipe_file(name, right[:-9] + b"altered!!")
    assert cli("verify", URL, "--quiet") == 4
    assert f"`streamfisher verify {URL} --repair` removes" in capsys.readouterr().out
    assert cli("verify", URL, "--repair", "--quiet") == 4
    assert "gram" in capsys.readouterr().out and not memory.exists("/bucket/run.zarr/done/gram-first.weight.json")
    assert cli("gram", URL, "--quiet") == 0 and memory.cat(name) == right
    assert cli("eigenvectors", URL, "--block", "global", "--blocks", "none", "--top", "2", "--quiet") == 0
    assert f"{URL}/eigenvectors/global" in capsys.readouterr().out
    assert cli("verify", URL, "--quiet") == 0
    local = make_run(tmp_path / "here" / "run.zarr").eigenvectors("global", 2, block_structure="none").projections()
    np.testing.assert_array_equal(open_eigenvectors(sf.open_run(URL).path, "global").projections(), local)
    assert not (tmp_path / "run.zarr.staging").exists()


@pytest.mark.parametrize("command", [["gram"], ["verify", "--repair"], ["eigenvectors", "--block", "global"]])
def test_a_place_without_a_run_is_not_locked(command, memory, tmp_path, capsys):
    assert cli(command[0], "memory://bucket/none.zarr", *command[1:], "--quiet") == 2
    assert "memory://bucket/none.zarr" in capsys.readouterr().err
    assert memory.find("/") == [] and list(tmp_path.iterdir()) == []


def test_whatever_writes_runs_writes_them_below_a_url(memory):
    make_run(URL)
    chunk = "/bucket/run.zarr/gradients/first.weight/c/1/0"
    memory.pipe_file(chunk, memory.cat(chunk)[:-9] + b"altered!!")
    assert len(sf.verify(sf.open_run(URL))) == 1
    with written(URL) as folder:
        assert len(sf.verify(sf.open_run(folder), repair=True)) == 1
    with pytest.raises(RunError, match="is not finished: 16 of 24 samples"):
        sf.open_run(URL).spectrum()
    assert sf.verify(make_run(URL)) == []
    with written(URL) as folder:
        vectors = sf.open_run(folder).eigenvectors("global", 2, block_structure="none")
        expected = vectors.projections()
    far = open_eigenvectors(sf.open_run(URL).path, "global")
    np.testing.assert_array_equal(far.projections(), expected)


def test_what_is_there_and_no_run_is_not_written_over(memory, tmp_path):
    memory.pipe_file("/bucket/run.zarr/precious", b"mine")
    with pytest.raises(RunError, match=r"is not a streamfisher run \(it holds precious\)"):
        make_run(URL)
    assert stored(memory) == {"precious": b"mine"}


def test_a_staging_folder_that_is_none_is_left_alone(memory, tmp_path):
    (tmp_path / "run.zarr.staging").mkdir()
    (tmp_path / "run.zarr.staging" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="exists and is no staging folder"):
        make_run(URL)
    assert (tmp_path / "run.zarr.staging" / "thesis.tex").read_text() == "mine"


def test_a_local_run_takes_no_staging(tmp_path):
    with pytest.raises(ConfigError, match="takes no staging"), written(tmp_path / "run.zarr", staging="x"):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoppedError(signal.SIGTERM)])
def test_what_a_signal_ends_is_sent_or_stays(error, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "_LOOK", 60.0)
    with pytest.raises(type(error)), written(URL) as folder:
        make_run(folder)
        raise error
    sent = [name for name in stored(memory) if name.startswith("done/rows")]
    assert len(sent) == (0 if isinstance(error, KeyboardInterrupt) else 3)
    assert (tmp_path / "run.zarr.staging" / "run.zarr" / "manifest.json").is_file()
    assert sf.verify(make_run(URL)) == []


# A store that does not answer.


class Outage:
    """Puts fail from the `first` one on, `count` of them."""

    def __init__(self, memory, monkeypatch, first, count):
        self.first, self.count, self.seen = first, count, 0
        plain = type(memory).pipe_file

        def put(store, path, *more, **options):
            if "/writers/" not in path:
                self.seen += 1
                if self.first <= self.seen < self.first + self.count:
                    raise OSError(101, "Network is unreachable")
            return plain(store, path, *more, **options)

        monkeypatch.setattr(type(memory), "pipe_file", put)


@pytest.mark.parametrize("first", [1, 5, 20, 45])
def test_a_network_that_is_lost_for_a_while_costs_nothing(first, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "_PAUSE", 0.05)
    outage = Outage(memory, monkeypatch, first, 9)
    make_run(URL)
    assert outage.seen > first + 9
    here = make_run(tmp_path / "here" / "run.zarr")
    here.build_grams()
    assert stored(memory) == files(here)


@pytest.mark.parametrize("first", [1, 20, 45])
def test_what_a_lost_network_left_here_is_sent_by_the_same_command(first, memory, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "_PAUSE", 0.05)
    monkeypatch.setattr(upload, "_PATIENCE", 0.2)
    with monkeypatch.context() as now:
        Outage(memory, now, first, 1 << 30)
        with pytest.raises(RemoteError, match=r"does not answer.*What is finished is in .*the same command sends it"):
            make_run(URL)
    assert (tmp_path / "run.zarr.staging" / "run.zarr" / "done" / "rows-000002.json").is_file()
    with monkeypatch.context() as now:  # nothing is computed again
        now.setattr("streamfisher.sinks.disk.DiskSink.unit", lambda *args: pytest.fail("computed again"))
        far = make_run(URL)
    assert sf.verify(far) == [] and far.info()["grams_done"] == 4
    assert not (tmp_path / "run.zarr.staging").exists()


def test_what_was_not_sent_is_computed_again_where_somebody_else_wrote_since(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "_PAUSE", 0.05)
    monkeypatch.setattr(upload, "_PATIENCE", 0.2)
    with monkeypatch.context() as now:
        Outage(memory, now, 20, 1 << 30)
        with pytest.raises(RemoteError):
            make_run(URL)
    with written(URL, staging=tmp_path / "elsewhere") as folder:
        make_run(folder)
    with pytest.warns(UserWarning, match="was written by another process since"):
        far = make_run(URL)
    assert sf.verify(far) == []


# Kills.

_PATHS = f"{Path(__file__).parents[1]}:{Path(sf.__file__).parents[1]}"

_COLLECT = """
import sys
sys.path[:0] = sys.argv[1].split(":")
import time
from streamfisher.runtime import upload
from streamfisher.sinks.disk import DiskSink
upload._LOOK, plain = 0.02, DiskSink.unit
DiskSink.unit = lambda *unit: time.sleep(0.2) or plain(*unit)  # so that not all are sent at once
from tiny_runs import make_run
make_run(sys.argv[2], 64, chunk_size=4, representation=sys.argv[3])
"""


def lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kept"), [("dense", "the run goes on elsewhere"), ("factors", "the staging folder is kept")]
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(how, kept, tmp_path):
    """At every kill, what the store has is intact, and says how far it is."""
    url, draw, seen = "s3://runs/killed.zarr", random.Random(how), []
    ledger = tmp_path / "killed.zarr.staging" / "sent.jsonl"
    with s3_server() as settings:
        store = bucket("runs")
        environment = os.environ | settings | {"OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", _COLLECT, _PATHS, url, how]
        for _ in range(4):
            process = subprocess.Popen(words, cwd=tmp_path, env=environment)
            more = lines(ledger) + draw.randint(30, 150)
            while process.poll() is None and lines(ledger) < more:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            if store.exists("runs/killed.zarr/manifest.json"):
                assert sf.verify(sf.open_run(url)) == []
                seen.append(len([name for name in store.find("runs/killed.zarr/done") if "/rows-" in name]))
            if kept != "the staging folder is kept":
                shutil.rmtree(tmp_path / "killed.zarr.staging", ignore_errors=True)
        assert seen == sorted(seen) and any(0 < count < 16 for count in seen)
        subprocess.run(words, cwd=tmp_path, env=environment, check=True)
        here = make_run(tmp_path / "here.zarr", 64, chunk_size=4, representation=how)
        here.build_grams()
        names = [name.removeprefix("runs/killed.zarr/") for name in store.find("runs/killed.zarr")]
        there = {name: store.cat(f"runs/killed.zarr/{name}") for name in names if "/c/" in name}
        assert there == arrays(files(here))
        assert sf.verify(sf.open_run(url)) == []


@pytest.mark.slow
def test_of_two_processes_that_write_one_run_the_second_is_refused(tmp_path):
    url = "s3://runs/two.zarr"
    with s3_server() as settings:
        bucket("runs")
        environment = os.environ | settings | {"OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", _COLLECT, _PATHS, url, "dense"]
        folders = [tmp_path / name for name in ("one", "other")]
        for folder in folders:
            folder.mkdir()
        both = [
            subprocess.Popen(
                words, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for folder in folders
        ]
        said = [process.communicate() for process in both]
        codes = sorted(process.returncode for process in both)
        assert codes in ([0, 0], [0, 1])  # one after the other, or at once
        if codes == [0, 1]:
            loser = next(process for process in both if process.returncode)
            winner = next(process for process in both if not process.returncode)
            assert f"is being written by process {winner.pid} on " in said[both.index(loser)][1]
        assert sf.verify(sf.open_run(url)) == []


def test_a_ledger_that_a_kill_cut_short_is_read_as_far_as_it_goes(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "_PATIENCE", 0.0)
    with monkeypatch.context() as now:
        Outage(memory, now, 30, 1 << 30)
        with pytest.raises(RemoteError):
            make_run(URL)
    ledger = tmp_path / "run.zarr.staging" / "sent.jsonl"
    lines = ledger.read_bytes().splitlines()
    assert len(lines) > 20 and json.loads(lines[1])["name"]
    ledger.write_bytes(ledger.read_bytes()[:-7] + b'\n[1]\n{"name": 3}\n')
    assert sf.verify(make_run(URL)) == []
