"""A file is there whole or as it was before."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from streamfisher.runtime import durable, replacing
from streamfisher.runtime.durable import MarkerBatch, read_json


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), replacing(path) as partial:
        partial.write_text("half of")
        raise OSError("the disk is full")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"page.html": "before"}


def test_a_write_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")
    with replacing(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"page.html": "after"}


def test_markers_of_a_batch_are_there_after_the_commit_and_not_before(tmp_path):
    batch = MarkerBatch(fsync=False)
    for number in range(3):
        batch.add(tmp_path / f"{number}.json", {"number": number})
    batch.add(tmp_path / "1.json", {"number": 4})  # made once more: the last one counts
    assert not list(tmp_path.glob("*.json"))
    batch.commit()
    assert [read_json(tmp_path / f"{number}.json")["number"] for number in range(3)] == [0, 4, 2]
    assert not list(tmp_path.glob("*.partial"))
    batch.commit()  # nothing is left


def test_a_batch_commits_by_itself_when_it_is_full_or_old(tmp_path, monkeypatch):
    monkeypatch.setattr(MarkerBatch, "MOST", 2)
    batch = MarkerBatch(fsync=False)
    batch.add(tmp_path / "0.json", {})
    assert not (tmp_path / "0.json").exists()
    batch.add(tmp_path / "1.json", {})
    assert (tmp_path / "0.json").exists() and (tmp_path / "1.json").exists()
    monkeypatch.setattr(MarkerBatch, "SECONDS", -1.0)
    batch.add(tmp_path / "2.json", {})
    assert (tmp_path / "2.json").exists()


def test_threads_share_a_batch(tmp_path):
    batch = MarkerBatch(fsync=False)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: batch.add(tmp_path / f"{number}.json", {"n": number}), range(300)))
    batch.commit()
    assert all(read_json(tmp_path / f"{number}.json") == {"n": number} for number in range(300))


def test_what_the_markers_of_a_batch_stand_for_is_flushed_first_where_that_is_asked_for(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(durable, "sync_filesystem", lambda folder: seen.append(sorted(folder.glob("*.json"))))
    batch = MarkerBatch(fsync=True)
    for number in range(3):
        batch.add(tmp_path / f"{number}.json", {})
    batch.commit()
    assert seen == [[]] and len(list(tmp_path.glob("*.json"))) == 3


def test_a_commit_flushes_the_folder_once_and_not_for_each_marker(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(durable, "sync_path", flushed.append)
    batch = MarkerBatch(fsync=False)
    for number in range(50):
        batch.add(tmp_path / f"{number}.json", {})
    batch.commit()
    assert len(flushed) == 51 and flushed[-1] == tmp_path
