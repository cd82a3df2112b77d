"""Files written past the page cache have the same bytes; where the filesystem cannot, or the disk fails, it shows."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from streamfisher.runtime import direct_io

BUFFER = direct_io.BUFFER


@pytest.fixture
def file(tmp_path):
    """Return an empty file on a filesystem that has direct I/O; the folder of temporary files may be in memory."""
    for folder in (tmp_path, Path(__file__).parent):
        path = folder / "direct.partial"
        path.touch()
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
        except OSError:
            path.unlink()
            continue
        yield path
        path.unlink(missing_ok=True)
        return
    pytest.skip("no filesystem here has direct I/O")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, BUFFER - 1, BUFFER, BUFFER + 1, 3 * BUFFER + 12345])
def test_the_bytes_are_those_that_were_written(file, size):
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    with direct_io.DirectFile(file) as opened:
        for piece in np.array_split(content, 7):
            opened.write(piece.data)
    assert file.read_bytes() == content.tobytes()


def test_a_thread_may_write_one_after_another(file):
    for content in (b"a" * 10000, b"b" * 20):
        file.write_bytes(b"")
        with direct_io.DirectFile(file) as opened:
            opened.write(memoryview(content))
        assert file.read_bytes() == content


def test_a_disk_that_takes_less_is_asked_again(file, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: pwrite(f, data[: max(4096, len(data) // 8192 * 4096)], at))
    content = os.urandom(BUFFER + 5000)
    with direct_io.DirectFile(file) as opened:
        opened.write(memoryview(content))
    assert file.read_bytes() == content


def test_a_full_disk_is_an_error(file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), direct_io.DirectFile(file) as opened:
        opened.write(memoryview(bytes(BUFFER)))
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(opened._file)


def test_a_disk_that_takes_nothing_is_no_endless_loop(file, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="less than a page"), direct_io.DirectFile(file) as opened:
        opened.write(memoryview(bytes(BUFFER)))


def test_auto_gives_the_page_cache_what_a_disk_that_is_behind_does_not_take_up_to_half_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(direct_io, "working_memory", lambda budget: 100)
    share = direct_io.CacheShare("auto")
    assert [share.is_past(40, behind=behind) for behind in (False, True, False, True, True)] == [
        *(True, False, True, False, True)
    ]
    for behind in (False, True):
        assert direct_io.CacheShare("always").is_past(1, behind=behind)
        assert not direct_io.CacheShare("never").is_past(10**15, behind=behind)
