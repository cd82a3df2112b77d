"""Chunks that are written beside Zarr: byte for byte those that Zarr itself would have written."""

import errno
import os

import google_crc32c
import numpy as np
import pytest
import torch
import zarr

from streamfisher.store import codecs
from streamfisher.store.chunks import ChunkWriter
from streamfisher.store.integrity import chunk_digest, digest_of_ends

CODECS = ["raw", "zstd", "blosc-lz4"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def by_zarr(path, values, chunk, dtype, codec):
    array = zarr.create_array(
        path,
        shape=values.shape,
        chunks=chunk,
        dtype=values.dtype,
        fill_value=codecs.fill_value(dtype),
        compressors=codecs.compressors(codec, dtype),
        config={"write_empty_chunks": True},
    )
    array[...] = values


def by_chunk_writer(path, values, chunk, dtype, codec):
    """Write all chunks of an array and return the digest of its files."""
    writer, ends = ChunkWriter(chunk, dtype, codec), {}
    path.mkdir()
    for row in range(-(-values.shape[0] // chunk[0])):
        for column in range(-(-values.shape[1] // chunk[1])):
            part = values[row * chunk[0] : (row + 1) * chunk[0], column * chunk[1] : (column + 1) * chunk[1]]
            place, end = writer.write(path, (row, column), part)
            ends[place] = end
    return digest_of_ends(ends)


def files(path):
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in (path / "c").rglob("*") if f.is_file()}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((8, 64), (4, 32)), ((7, 50), (4, 32)), ((1, 1), (4, 32)), ((6, 20_000), (4, 8192))],
    ids=["whole chunks", "edges", "one number", "long rows"],
)
def test_every_file_is_the_one_that_zarr_writes(shape, chunk, dtype, codec, tmp_path):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    values = codecs.encode(rows, dtype)
    by_zarr(tmp_path / "zarr", values, chunk, dtype, codec)
    digest = by_chunk_writer(tmp_path / "ours", values, chunk, dtype, codec)
    assert files(tmp_path / "ours") == files(tmp_path / "zarr")
    assert digest == chunk_digest(tmp_path / "ours")


def test_a_checksum_is_of_the_values_in_c_order_wherever_they_lie():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert codecs.checksum(values.T) == google_crc32c.value(np.ascontiguousarray(values.T).tobytes())


def test_a_write_that_fails_leaves_the_old_chunk_and_no_other_file(tmp_path, monkeypatch):
    writer = ChunkWriter((2, 4), torch.float32, "raw")
    old = np.zeros((2, 4), dtype=np.float32)
    writer.write(tmp_path, (0, 0), old)
    monkeypatch.setattr(writer, "_pieces", lambda values: iter([values.reshape(-1).view(np.uint8), "no bytes"]))
    with pytest.raises(TypeError):
        writer.write(tmp_path, (0, 0), old + 1)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["0"]
    assert (tmp_path / "c" / "0" / "0").read_bytes()[:-4] == old.tobytes()


@pytest.mark.parametrize("codec", ["raw", "blosc-lz4"])
def test_chunks_are_the_same_files(tmp_path, codec):
    values = np.random.default_rng(0).standard_normal((8, 300_000), dtype=np.float32)
    for name in (False, True):
        ChunkWriter((8, 131_072), torch.float32, codec, direct=name).write(
            tmp_path / str(name), (0, 1), values[:, :131_072]
        )
    assert (tmp_path / "True/c/0/1").read_bytes() == (tmp_path / "False/c/0/1").read_bytes()


def test_a_filesystem_that_refuses_direct_io_when_opened_or_written_is_written_as_others_are(tmp_path, monkeypatch):
    tried = []

    def refused(path):
        tried.append(path)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def refused_write(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("streamfisher.store.chunks.DirectFile", refused)
    values = np.ones((8, 65_536), dtype=np.float32)
    ChunkWriter((8, 65_536), torch.float32, "raw", direct=True).write(tmp_path, (0, 0), values)
    assert len(tried) == 1
    monkeypatch.undo()
    monkeypatch.setattr(os, "pwrite", refused_write)
    ChunkWriter((8, 65_536), torch.float32, "raw", direct=True).write(tmp_path, (0, 1), values)
    assert (tmp_path / "c/0/1").read_bytes() == (tmp_path / "c/0/0").read_bytes()
    assert (tmp_path / "c/0/0").read_bytes()[:-4] == values.tobytes()
