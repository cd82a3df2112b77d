"""Parts of arrays read beside Zarr: the values that Zarr reads, and every damage refused."""

import os

import numpy as np
import pytest
import torch
import zarr

from streamfisher.errors import CorruptRunError
from streamfisher.store import codecs
from streamfisher.store.chunk_reading import ChunkReader, read_decoded
from streamfisher.store.opening import read_facts

SHAPE, CHUNK = (11, 20_000), (4, 8192)
CODECS = ["raw", "zstd", "blosc-lz4"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PARTS = {
    "all": (slice(0, 11), slice(0, 20_000)),
    "whole chunks": (slice(0, 8), slice(8192, 16384)),
    "rows of the last unit": (slice(8, 11), slice(0, 20_000)),
    "some rows": (slice(1, 7), slice(0, 20_000)),
    "some columns": (slice(0, 11), slice(100, 9000)),
    "one number": (slice(5, 6), slice(8191, 8192)),
    "nothing": (slice(3, 3), slice(0, 5)),
}


def stored(path, codec, dtype=torch.float32):
    rows = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    values = codecs.encode(rows, dtype)
    array = zarr.create_array(
        path,
        shape=SHAPE,
        chunks=CHUNK,
        dtype=values.dtype,
        fill_value=codecs.fill_value(dtype),
        compressors=codecs.compressors(codec, dtype),
        config={"write_empty_chunks": True},
    )
    array[...] = values
    return values, rows.double().numpy()


def reader(path, **options):
    return ChunkReader(path, read_facts(path), **options)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_part_has_the_values_that_were_stored(codec, dtype, tmp_path):
    values, rows = stored(tmp_path / "array", codec, dtype)
    wide = np.float64 if dtype == torch.float64 else np.float32
    for name, part in PARTS.items():
        shape = tuple(axis.stop - axis.start for axis in part)
        assert np.array_equal(
            reader(tmp_path / "array").read_into(part, np.empty(shape, values.dtype)), values[part]
        ), name
        found = read_decoded(reader(tmp_path / "array"), *part, dtype, np.empty(shape, wide))
        assert np.array_equal(found, rows[part]), name


@pytest.mark.parametrize("codec", CODECS)
def test_a_part_of_a_larger_buffer_is_filled_and_the_rest_left_alone(codec, tmp_path):
    values, _ = stored(tmp_path / "array", codec)
    out = np.full((11, 30_000), 7, dtype=np.float32)
    reader(tmp_path / "array").read_into(PARTS["all"], out[:, 5_000:25_000])
    assert np.array_equal(out[:, 5_000:25_000], values)
    assert (out[:, :5_000] == 7).all() and (out[:, 25_000:] == 7).all()


def test_ids_in_one_dimension(tmp_path):
    array = zarr.create_array(
        tmp_path / "ids", shape=(10,), chunks=(4,), dtype="int32", fill_value=-1,
        compressors=codecs.compressors("zstd", torch.float32),
    )  # fmt: skip
    array[...] = np.arange(10)
    assert reader(tmp_path / "ids").read_into((slice(3, 9),), np.empty(6, np.int32)).tolist() == list(range(3, 9))


@pytest.mark.parametrize("codec", CODECS)
def test_a_missing_chunk_reads_as_its_fill_value_or_is_refused(codec, tmp_path):
    values, _ = stored(tmp_path / "array", codec)
    (tmp_path / "array" / "c" / "1" / "0").unlink()
    found = reader(tmp_path / "array").read_into(PARTS["all"], np.empty(SHAPE, np.float32))
    assert np.isnan(found[4:8, :8192]).all()
    assert np.array_equal(np.delete(found, range(4, 8), 0), np.delete(values, range(4, 8), 0))
    with pytest.raises(CorruptRunError, match="is missing"):
        reader(tmp_path / "array", complete=True).read_into(PARTS["all"], np.empty(SHAPE, np.float32))


def flip(at):
    def change(content):
        content[at if at < len(content) else len(content) // 2] ^= 1

    return change


DAMAGE = {
    "first byte": flip(0),
    "middle": flip(70_000),
    "checksum": flip(-1),
    "cut short": lambda content: content.__delitem__(slice(-9, None)),
    "longer": lambda content: content.extend(b"123456789"),
    "empty": lambda content: content.clear(),
    "zeros": lambda content: content.__setitem__(slice(None), bytes(len(content))),
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", ["whole chunks", "some columns"])
def test_damage_is_refused(codec, damage, part, tmp_path):
    stored(tmp_path / "array", codec)
    for chunk in (tmp_path / "array" / "c" / "0").iterdir():
        content = bytearray(chunk.read_bytes())
        DAMAGE[damage](content)
        chunk.write_bytes(content)
    shape = tuple(axis.stop - axis.start for axis in PARTS[part])
    with pytest.raises((CorruptRunError, ValueError, RuntimeError), match=r"checksum|not a chunk of"):
        reader(tmp_path / "array").read_into(PARTS[part], np.empty(shape, np.float32))


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_only_regular_files_are_read(kind, tmp_path):
    stored(tmp_path / "array", "raw")
    chunk = tmp_path / "array" / "c" / "0" / "1"
    content = chunk.read_bytes()
    chunk.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        chunk.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(chunk)
    else:
        chunk.mkdir()
    with pytest.raises((CorruptRunError, OSError)):
        reader(tmp_path / "array", complete=True).read_into(PARTS["whole chunks"], np.empty((8, 8192), np.float32))
