"""Files of a run are its own: no link is followed, no FIFO waited for, nothing of others overwritten or deleted."""

import os

import pytest

from streamfisher.errors import CorruptRunError
from streamfisher.runtime import read_json, replacing, write_json
from streamfisher.runtime.durable import sweep_partials
from streamfisher.runtime.own_files import open_own, read_own, remove_tree, require_own, require_own_files


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("{}")
    return tmp_path / "outside"


def foreign(kind, path, outside):
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"file": outside / "file", "folder": outside, "nothing": outside / "none"}[kind])


@pytest.mark.parametrize("kind", ["fifo", "file", "folder", "nothing"])
def test_what_is_not_a_runs_own_is_refused_wherever_it_lies(kind, tmp_path, outside):
    run = tmp_path / "run"
    (run / "a" / "b").mkdir(parents=True)
    write_json(run / "a" / "b" / "whole.json", {})
    require_own_files(run)
    foreign(kind, run / "a" / "b" / "c", outside)
    with pytest.raises(CorruptRunError, match="a FIFO" if kind == "fifo" else "a link"):
        require_own_files(run)
    for ask in (lambda at: open_own(at, os.O_RDWR | os.O_CREAT), lambda at: read_own(at, 10), read_json):
        with pytest.raises(CorruptRunError):
            ask(run / "a" / "b" / "c")
    with pytest.raises(CorruptRunError):
        require_own(run, run / "a" / "b" / "c" / "d")
    assert [path.name for path in outside.iterdir()] == ["file"]


def test_a_folder_that_is_a_link_may_hold_a_run(tmp_path, outside):
    (tmp_path / "run").symlink_to(outside)
    require_own_files(tmp_path / "run")
    require_own(tmp_path / "run", tmp_path / "run" / "file")


def test_nothing_is_deleted_through_a_link_or_above_the_run(tmp_path, outside):
    run = tmp_path / "run"
    run.mkdir()
    (run / "gram").symlink_to(outside)
    (run / "x.partial").symlink_to(outside / "file")
    for path in (run / "gram", run / "gram" / "inner", run / ".." / "outside", outside):
        with pytest.raises(CorruptRunError):
            remove_tree(run, path)
    assert sweep_partials(run) == 1
    assert [path.name for path in outside.iterdir()] == ["file"]


def test_a_file_is_written_under_a_name_that_nobody_can_have_laid_a_link_at(tmp_path):
    with replacing(tmp_path / "a.json") as one, replacing(tmp_path / "a.json") as two:
        assert one != two
        for path in (one, two):
            assert path.is_file()
            path.write_text("whole")
    assert (tmp_path / "a.json").read_text() == "whole"


def test_an_interrupt_leaves_no_partial_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.json"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptRunError, match="more than any run"):
        read_json(tmp_path / "big.json")


@pytest.mark.parametrize("flags", [os.O_WRONLY | os.O_APPEND, os.O_RDWR])
def test_a_file_with_another_name_is_read_and_not_written_in_place(tmp_path, flags):
    (tmp_path / "outside").write_text("not yours")
    os.link(tmp_path / "outside", tmp_path / "inside")
    assert read_own(tmp_path / "inside", 100) == b"not yours"
    with pytest.raises(CorruptRunError, match="hard link"):
        open_own(tmp_path / "inside", flags)
