"""What a run leaves to the garbage collector."""

import gc

import pytest

from streamfisher.runtime import memory
from streamfisher.runtime.memory import sparing_old_objects


@pytest.fixture(autouse=True)
def thawed():
    """As a process begins; the test session may have frozen what it loaded."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    if frozen:
        gc.freeze()


def test_garbage_that_is_made_meanwhile_is_collected_and_what_was_there_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(memory, "_MUCH", 1e9)
    with sparing_old_objects():
        assert gc.get_freeze_count() > 1000
        made = []
        made.append(made)
        del made
        assert gc.collect() >= 1
        assert len(gc.get_objects()) < 0.1 * gc.get_freeze_count()
    assert gc.get_freeze_count() == 0


def test_where_a_process_holds_much_its_garbage_is_freed_first(monkeypatch):
    looked = []
    monkeypatch.setattr(memory.gc, "collect", lambda: looked.append(gc.get_freeze_count()))
    monkeypatch.setattr(memory, "_MUCH", 0.0)
    with sparing_old_objects():
        assert looked == [0]


def test_what_somebody_else_froze_stays_frozen():
    gc.freeze()
    with sparing_old_objects():
        pass
    assert gc.get_freeze_count() > 0


def test_objects_are_thawed_after_an_error(monkeypatch):
    monkeypatch.setattr(memory, "_MUCH", 1e9)
    with pytest.raises(ValueError, match="stop"), sparing_old_objects():
        raise ValueError("stop")
    assert gc.get_freeze_count() == 0
