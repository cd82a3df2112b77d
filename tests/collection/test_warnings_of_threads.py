"""Threads of a run leave the process's warnings alone: filters belong to all threads, and who restores them last wins.

Two threads that switch warnings off for a moment, one after the other, can leave them off for good, for the caller too.
"""

import threading
import warnings

import pytest
from tiny_models import TinyCausal, sequences

import streamfisher as sf


@pytest.fixture
def entered(monkeypatch):
    """Return the threads, other than this one, that save and restore the filters of warnings."""
    found, enter = [], warnings.catch_warnings.__enter__

    def seen(self):
        if threading.current_thread() is not threading.main_thread():
            found.append(threading.current_thread().name)
        return enter(self)

    monkeypatch.setattr(warnings.catch_warnings, "__enter__", seen)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"hold": "disk", "representation": "factors"},
        {"hold": "disk", "representation": "dense"},
        {"hold": "disk", "representation": "dense", "bitround": 8, "dtype_model": "float32"},
        {"hold": "host"},
        {"hold": "host", "keep_gradients": ("*",)},
        {"hold": "disk", "stream": "none", "keep_gradients": ()},
        {"hold": "disk", "store_centered": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_no_thread_switches_warnings_off(tmp_path, entered, options):
    filters = list(warnings.filters)
    run = sf.collect(
        TinyCausal(16), sequences(12, 9), tmp_path / "run", config=sf.SpectralConfig(chunk_size=4, **options)
    )
    assert run.spectrum("parameter").global_.trace > 0
    if run.store.keep == ["*"]:
        run.rebuild_grams()
    assert entered == []
    assert list(warnings.filters) == filters
