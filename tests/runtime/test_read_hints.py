"""Hints let the disk begin: with whole files, and what is wrong with one is left to whoever reads it."""

import os
import threading

import pytest

from streamfisher.errors import CorruptRunError
from streamfisher.runtime import read_hints

ReadHints, _STEP = read_hints.ReadHints, read_hints._STEP


@pytest.fixture
def hinted(monkeypatch):
    found = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: found.append((start, size, advice)))
    return found


def test_every_byte_of_a_file_is_asked_for_in_steps_that_no_kernel_cuts(tmp_path, hinted):
    (tmp_path / "chunk").write_bytes(bytes(2 * _STEP + 5))
    with ReadHints() as hints:
        hints.give(lambda: [tmp_path / "chunk"])
        hints._pool.shutdown()
    assert hinted == [(start, _STEP, os.POSIX_FADV_WILLNEED) for start in (0, _STEP, 2 * _STEP)]


def test_files_that_are_missing_or_foreign_are_left_to_whoever_reads_them(tmp_path, hinted):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")

    def damaged():
        raise CorruptRunError("a marker is damaged")

    with ReadHints() as hints:
        for name in ("missing", "fifo", "link"):
            hints.give(lambda name=name: [tmp_path / name])
        hints.give(damaged)
        hints._pool.shutdown()
    assert hinted == []


def test_hints_that_are_late_are_dropped(tmp_path, hinted):
    entered, leave = threading.Event(), threading.Event()

    def slow():
        entered.set()
        leave.wait()
        return []

    with ReadHints() as hints:
        for _ in range(2):
            hints.give(slow)
        entered.wait()
        for _ in range(50):
            hints.give(lambda: [tmp_path / "late"] if hinted.append("late") is None else [])
        leave.set()
        hints.__exit__()
    assert hinted.count("late") < 50


def test_where_the_kernel_takes_no_hints_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    with ReadHints() as hints:
        hints.give(lambda: pytest.fail("looked for files"))
