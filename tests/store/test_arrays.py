"""Arrays that are written whole are those that Zarr writes: the same metadata, and values that Zarr reads."""

import json

import numpy as np
import pytest
import zarr

from streamfisher.errors import CorruptRunError
from streamfisher.store import arrays, integrity, opening


@pytest.mark.parametrize("shape", [(3,), (5, 5), (1030, 1030), (2050,), (1500, 40)])
def test_what_is_written_is_what_zarr_writes_and_reads(tmp_path, shape):
    values = np.random.default_rng(0).standard_normal(shape)
    dimensions, attributes = ("one", "other")[: len(shape)], {"parameter": "a.b", "parameters": ["a.b", "ü"]}
    (tmp_path / "ours").mkdir()
    digest = arrays.write_array(tmp_path / "ours", "gram/x", values, dimensions, attributes)
    arrays.create_array(tmp_path / "zarr", "gram/x", shape, dimensions, attributes)[...] = values

    ours, theirs = (
        sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
        for run in (tmp_path / "ours", tmp_path / "zarr")
    )
    assert ours == [name for name in theirs if name != "zarr.json"]  # the folder of a run is a group already
    for name in ("gram/zarr.json", "gram/x/zarr.json"):
        assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads((tmp_path / "zarr" / name).read_text())
    assert np.array_equal(zarr.open_array(tmp_path / "ours" / "gram" / "x", mode="r")[...], values)
    for run in (tmp_path / "ours", tmp_path / "zarr"):
        folder = run / "gram" / "x"
        assert np.array_equal(arrays.read_array(folder, opening.read_facts(folder)), values)
    assert digest == integrity.chunk_digest(tmp_path / "ours" / "gram" / "x")


def test_an_array_takes_the_place_of_one_that_had_more_chunks(tmp_path):
    arrays.write_array(tmp_path, "gram/x", np.ones((1100, 1100)), ("sample", "sample_j"), {})
    digest = arrays.write_array(tmp_path, "gram/x", np.zeros((2, 2)), ("sample", "sample_j"), {})
    assert digest == integrity.chunk_digest(tmp_path / "gram" / "x")
    assert np.array_equal(zarr.open_array(tmp_path / "gram" / "x", mode="r")[...], np.zeros((2, 2)))


def test_a_part_is_read_by_itself_and_what_is_not_there_reads_as_nan(tmp_path):
    values = np.arange(1500.0 * 1030).reshape(1500, 1030)
    arrays.write_array(tmp_path, "gram/x", values, ("sample", "sample_j"), {})
    folder = tmp_path / "gram" / "x"
    (folder / "c" / "0" / "1").unlink()
    facts = opening.read_facts(folder)
    part = (slice(1000, 1400), slice(None, 1024))
    assert np.array_equal(arrays.read_array(folder, facts, part), values[part])
    assert arrays.read_array(folder, facts, (slice(5, 5), slice(0, 3))).shape == (0, 3)
    found = arrays.read_array(folder, facts)
    assert np.isnan(found[:1024, 1024:]).all()
    assert np.array_equal(found[1024:], values[1024:])


def test_attributes_that_are_no_mapping_are_refused(tmp_path):
    arrays.write_array(tmp_path, "gram/x", np.ones((2, 2)), ("sample", "sample_j"), {})
    path = tmp_path / "gram" / "x" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attributes": [1]}))
    with pytest.raises(CorruptRunError, match="its attributes are"):
        opening.read_facts(path.parent)
