"""Memory and open files do not grow with the number of batches."""

import pytest
from benchmarks.long_run import long_run


@pytest.mark.slow
def test_handles_and_memory_stay_flat_over_600_batches(tmp_path):
    first, last = long_run(tmp_path / "run.zarr", 600, at=[100, 600])
    assert (first.batches, last.batches) == (100, 600)
    # A look may find a writer's file open or closed: a handle for each writer, not one for each unit.
    assert abs(last.handles - first.handles) < 10
    assert last.rss - first.rss < 8
