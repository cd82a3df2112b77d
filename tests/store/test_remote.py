"""A run below a URL is read as a local one is, and nothing is written there."""

import importlib.util
import json
import pickle
import re
import shutil
import socket
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from command_line import cli
from s3_server import bucket, s3_server
from tiny_runs import forget_last_unit, make_run

import streamfisher as sf
from streamfisher.errors import CorruptRunError, MissingExtraError, RemoteError, RunError
from streamfisher.runtime import remote_store
from streamfisher.runtime.paths import expanded
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.store import open_eigenvectors


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Runs of each kind of holding gradients: as rows, centered rows, factors, and no longer."""
    folder = tmp_path_factory.mktemp("remote")
    runs = {
        "dense": make_run(folder / "dense.zarr", representation="dense"),
        "centered": make_run(folder / "centered.zarr", store_centered=True),
        "factors": make_run(folder / "factors.zarr", representation="factors"),
        "deleted": make_run(folder / "deleted.zarr", keep_gradients=["none"], hold="disk"),
    }
    for run in runs.values():
        run.build_grams()
    runs["factors"].eigenvectors("global", 2, block_structure="none")
    return runs


@pytest.fixture
def there(local):
    """The same runs in the memory of this process, below `memory://`."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    for name, run in local.items():
        memory.put(str(run.path), f"/{name}.zarr", recursive=True)
    yield memory
    memory.store.clear()


@pytest.fixture(scope="module")
def s3(local):
    with s3_server() as settings:
        store = bucket("runs")
        for name, run in local.items():
            store.put(str(run.path), f"runs/{name}.zarr", recursive=True)
        yield settings


def content(memory):
    return {name: file.getvalue() for name, file in memory.store.items()}


def same_spectra(one, other):
    assert one.global_.eigenvalues.tobytes() == other.global_.eigenvalues.tobytes()
    for key, block in one.blocks.items():
        assert block.eigenvalues.tobytes() == other.blocks[key].eigenvalues.tobytes()


@pytest.mark.parametrize("kind", ["dense", "centered", "factors", "deleted"])
@pytest.mark.parametrize("scheme", ["memory:/", "s3://runs"])
def test_a_run_below_a_url_gives_what_the_local_one_gives(kind, scheme, local, there, request):
    if scheme.startswith("s3"):
        request.getfixturevalue("s3")
    here, far = local[kind], sf.open_run(f"{scheme}/{kind}.zarr")
    assert str(far.path) == f"{scheme}/{kind}.zarr" and repr(far).startswith(f"Run('{scheme}")
    same_spectra(far.spectrum("parameter", top_k=5), here.spectrum("parameter", top_k=5))
    same_spectra(far.spectrum("none", center=True), here.spectrum("none", center=True))
    np.testing.assert_array_equal(far.losses, here.losses)
    assert {**far.info(), "path": 0} == {**here.info(), "path": 0}
    assert sf.verify(far) == []
    if kind != "deleted":
        for name, size in here.parameters.items():
            np.testing.assert_array_equal(far.store.rows.columns(name, 0, size), here.store.rows.columns(name, 0, size))
        wider = here.config.replace(dtype_gram="float64")  # Grams of rows that come from there
        same_spectra(far.spectrum("parameter", config=wider), here.spectrum("parameter", config=wider))


def test_commands_that_read_take_a_url(there, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before, run = content(there), "memory://dense.zarr"
    whole = ("--blocks", "none", "--block", "global")
    for command in (
        ["info", run],
        ["info", run, "--watch", "--interval", "0.01"],
        ["verify", run],
        ["spectrum", run, "--samples", "loss>0", "--center", "both", "--out", "spectrum.json"],
        ["density", run, *whole],
        ["samples", run],
        ["influence", run, "--queries", run, "--damping", "1e-3"],
        ["directions", run],
        ["compare", run, "memory://factors.zarr", "--top", "0"],
        ["export", run, "--to", "npz"],
        ["report", run],
    ):
        assert cli(*command, "--quiet") == 0, (command, capsys.readouterr().err)
    assert content(there) == before
    named = {"spectrum.json", "spectrum.npz", "spectrum.png", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == named


def test_what_would_be_written_is_refused_and_not_written(there):
    run = sf.open_run("memory://dense.zarr")
    before = content(there)
    with pytest.raises(RunError, match="is open for reading only"):
        run.eigenvectors("global", block_structure="none")
    assert content(there) == before
    there.store["/dense.zarr/gram/first.weight/c/0/0"].write(b"x")
    before = content(there)
    with pytest.raises(RunError, match="is open for reading only"):
        sf.verify(sf.open_run("memory://dense.zarr"), repair=True)
    assert content(there) == before


def test_eigenvectors_that_are_there_are_read(local, there):
    here, far = (open_eigenvectors(run, "global") for run in (local["factors"].path, expanded("memory://factors.zarr")))
    np.testing.assert_array_equal(here.projections(), far.projections())
    for name, vectors in here.arrays().items():
        np.testing.assert_array_equal(vectors.compute(), far.arrays()[name].compute())


def test_an_unfinished_run_says_so(there, local, tmp_path):
    shutil.copytree(local["dense"].path, tmp_path / "half.zarr")
    forget_last_unit(sf.open_run(tmp_path / "half.zarr"))
    there.put(str(tmp_path / "half.zarr"), "/half.zarr", recursive=True)
    far = sf.open_run("memory://half.zarr")
    with pytest.raises(RunError, match="16 of 24 samples have gradients"):
        far.spectrum()
    same_spectra(far.spectrum(partial=True), sf.open_run(tmp_path / "half.zarr").spectrum(partial=True))


def test_only_what_is_needed_is_read(there, monkeypatch):
    read = []
    plain = remote_store.RemoteStore._read
    monkeypatch.setattr(
        remote_store.RemoteStore, "_read", lambda self, key, size: read.append(key) or plain(self, key, size)
    )
    sf.open_run("memory://dense.zarr").spectrum()
    assert read and not [key for key in read if key.startswith(("gradients/", "factors/"))]
    assert len(read) == len(set(read))  # nothing twice
    read.clear()
    sf.open_run("memory://dense.zarr").store.rows.columns("first.weight", 0, 1)
    assert {key.split("/")[1] for key in read if key.startswith("gradients/")} == {"first.weight"}


def altered(memory, name, data):
    memory.pipe_file(f"/dense.zarr/{name}", data)


DAMAGE = {
    "an altered chunk": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "a truncated one": lambda data: data[: len(data) // 2],
    "an empty one": lambda data: b"",
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("where", ["gram/first.weight/c/0/0", "gradients/first.weight/c/1/0", "samples/loss/c/1"])
def test_damage_is_found(case, where, there):
    altered(there, where, DAMAGE[case](there.cat(f"/dense.zarr/{where}")))
    far = sf.open_run("memory://dense.zarr")
    with pytest.raises(CorruptRunError):
        far.losses, far.store.grams.read("first.weight"), far.store.rows.columns("first.weight", 0, 3)
    assert len(sf.verify(sf.open_run("memory://dense.zarr"))) >= 1


@pytest.mark.parametrize("where", ["gram/first.weight/c/0/0", "gradients/first.weight/c/1/0", "samples/loss/c/1"])
@pytest.mark.parametrize("when", ["before it was listed", "after it was listed"])
def test_an_object_that_vanished_is_never_read_as_zeros(where, when, there):
    far = sf.open_run("memory://dense.zarr")
    if when == "after it was listed":
        far.store.grams.read("second.bias"), far.store.rows.columns("second.bias", 0, 1), far.store.samples.skipped()
        (far.path / where).is_file()
    there.rm_file(f"/dense.zarr/{where}")
    with pytest.raises(CorruptRunError):
        far.losses, far.store.grams.read("first.weight"), far.store.rows.columns("first.weight", 0, 3)


def test_chunks_that_changed_places_are_found(there):
    one, other = (f"/dense.zarr/gradients/first.weight/c/{unit}/0" for unit in (0, 1))
    first, second = there.cat(one), there.cat(other)
    there.pipe_file(one, second)
    there.pipe_file(other, first)
    with pytest.raises(CorruptRunError, match="not those that were"):
        sf.open_run("memory://dense.zarr").store.rows.columns("first.weight", 0, 3)


def test_a_file_of_any_length_is_not_read(there):
    altered(there, "manifest.json", b" " * (65 << 20))
    with pytest.raises(CorruptRunError, match="more than any run"):
        sf.open_run("memory://dense.zarr")


def test_a_file_that_is_written_anew_meanwhile_is_not_read_in_part(there):
    far = sf.open_run("memory://dense.zarr")
    far.store.samples.skipped()
    altered(there, "gram/first.weight/zarr.json", there.cat("/dense.zarr/gram/first.weight/zarr.json") + b" ")
    assert (far.path / "gram/first.weight/c/0/0").is_file()  # listed
    altered(there, "gram/first.weight/c/0/0", b"longer" * 10_000)
    with pytest.raises(RemoteError, match=r"was written anew, or the connection broke"):
        far.store.grams.read("first.weight")


def test_another_process_opens_it_again(there, local):
    store = sf.open_run("memory://dense.zarr").store
    again = pickle.loads(pickle.dumps(store))
    assert isinstance(again.path, RemotePath) and again.path == store.path and hash(again.path) == hash(store.path)
    np.testing.assert_array_equal(again.samples.per_sample("loss"), local["dense"].losses)
    rows = pickle.loads(pickle.dumps(store.rows))
    np.testing.assert_array_equal(rows.columns("second.bias", 0, 1), store.rows.columns("second.bias", 0, 1))


def test_a_file_url_is_a_local_folder(local):
    assert sf.open_run(f"file://{local['dense'].path}").path == local["dense"].path


# What keeps a store from answering is never taken for damage.


def test_a_place_where_nothing_is(s3, capsys):
    for url, words in (
        ("s3://runs/nothing.zarr", "does not exist"),
        ("s3://no-such-bucket/dense.zarr", "The specified bucket does not exist"),
        ("nonsense://runs/dense.zarr", "Protocol not known"),
    ):
        assert cli("info", url) == 2
        assert words in capsys.readouterr().err


def test_no_credentials(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(RemoteError, match=r"credentials.*AWS_PROFILE"):
        sf.open_run("s3://runs/dense.zarr")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("what", ["grams", "rows", "verify"])
def test_a_network_that_is_lost_midway_is_no_damage(what, there, monkeypatch):
    far = sf.open_run("memory://dense.zarr")
    far.store.samples.skipped()

    def lost(*args, **options):
        raise OSError(101, "Network is unreachable")

    for call in ("cat_file", "cat_ranges", "find", "ls"):
        monkeypatch.setattr(far.path.store.filesystem, call, lost)
    with pytest.raises(RemoteError, match=r"does not answer \(OSError.*Network is unreachable"):
        if what == "grams":
            far.spectrum()
        elif what == "rows":
            far.store.rows.columns("first.weight", 0, 3)
        else:
            sf.verify(far)


def test_a_server_that_is_gone(local, monkeypatch):
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(RemoteError, match="does not answer"):
        sf.open_run("s3://runs/dense.zarr")


def test_a_store_that_refuses_access(there, monkeypatch):
    far = sf.open_run("memory://dense.zarr")

    def refused(*args, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(far.path.store.filesystem, "cat_file", refused)
    with pytest.raises(RemoteError, match=r"the store refuses access \(Access Denied\)"):
        far.store.rows.columns("first.weight", 0, 3)


def test_what_is_not_installed_is_named(monkeypatch):
    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "fsspec" else plain(name, *more)
    )
    with pytest.raises(MissingExtraError, match=r"pip install 'streamfisher\[remote\]'"):
        sf.open_run("s3://runs/dense.zarr")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtraError, match="pip install gcsfs"):
        sf.open_run("gs://runs/dense.zarr")


def test_the_page_on_object_stores_runs(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "remote.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    exec(compile(code, "docs/remote.md", "exec"), {"__name__": "documentation"})


def test_results_say_where_the_run_is(there, capsys):
    assert cli("info", "memory://dense.zarr", "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == "memory://dense.zarr"
