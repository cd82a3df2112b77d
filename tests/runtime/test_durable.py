"""A file is there whole or as it was before."""

import pytest

from streamfisher.runtime import replacing


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
