"""What a file of a run may ask for is bounded before anything of it is parsed, allocated or unpacked."""

import json
import shutil
import struct
import tracemalloc

import google_crc32c
import numcodecs
import numpy as np
import pytest
import torch
import zarr
from tiny_runs import make_run

from streamfisher import open_run, verify
from streamfisher.errors import CorruptRunError
from streamfisher.store import RunStore, codecs
from streamfisher.store.opening import open_array, unpacked_size


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("opening") / "run.zarr", store_centered=True)
    run.build_grams()
    return run.path


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


@pytest.fixture(autouse=True)
def in_little_memory():
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def ask(run):
    opened = open_run(run)
    opened.losses  # noqa: B018
    opened.store.rows.columns("first.weight", 0, 4)
    opened.spectrum("parameter")


GZIP = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip", "configuration": {"level": 9}}]
SHARDED = [
    {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, 1],
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "index_location": "end",
        },
    }
]
HOSTILE = {
    "another codec": {"codecs": GZIP},
    "shards": {"codecs": SHARDED},
    "no checksum": {"codecs": GZIP[:1]},
    "the other byte order": {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]},
    "elements of any length": {"data_type": "string", "codecs": [{"name": "vlen-utf8"}], "fill_value": ""},
    "another dtype": {"data_type": "complex128", "fill_value": [0.0, 0.0]},
    "a dtype that is no name": {"data_type": {"name": "numpy.datetime64", "configuration": {}}},
    "missing chunks that read as zeros": {"fill_value": 7.0},
    "true for one": {"fill_value": True},
    "a group": {"node_type": "group"},
    "chunks that are none": {"chunk_grid": {"name": "rectilinear", "configuration": {}}},
    "transformers": {"storage_transformers": [{"name": "x"}]},
    "a negative shape": {"shape": [-1, 3]},
    "a shape of text": {"shape": "12"},
    "codecs that are none": {"codecs": 7},
}


@pytest.mark.parametrize("where", ["gradients/first.weight", "samples/loss", "gram/first.weight", "mean/first.weight"])
@pytest.mark.parametrize("case", HOSTILE)
def test_metadata_of_another_form_are_refused_before_zarr_acts_on_them(case, where, run, monkeypatch):
    path = run / where / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | HOSTILE[case]))
    with pytest.raises(CorruptRunError):
        open_array(path.parent)
    with pytest.raises(CorruptRunError):
        ask(run)


def test_metadata_of_any_length_are_not_read(run):
    with (run / "samples/loss/zarr.json").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptRunError, match="more than any run"):
        ask(run)
    assert verify(open_run(run))


@pytest.mark.parametrize("name", ["manifest.json", "done/rows-000000.json", "done/gram-first.weight.json"])
def test_json_of_any_length_is_not_read(name, run):
    with (run / name).open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptRunError, match="more than any run"):
        opened = open_run(run)
        opened.store.samples.skipped()
        opened.store.grams.read("first.weight")


def sealed(data):
    return data + struct.pack("<I", google_crc32c.value(data))


BOMBS = {
    "zstd": ("gram/first.weight", numcodecs.Zstd(level=9).encode(np.zeros(1 << 27, np.uint8))),
    "blosc": ("gradients/first.weight", numcodecs.Blosc(cname="lz4", clevel=9).encode(np.zeros(1 << 18, np.uint8))),
    "zstd that does not say": ("gram/first.weight", b"\x28\xb5\x2f\xfd\x00\x58" + bytes(40)),
    "two frames": ("gram/first.weight", 2 * numcodecs.Zstd(level=9).encode(np.zeros(1 << 20, np.uint8))),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_chunk_that_would_unpack_to_more_is_not_unpacked(case, run):
    where, content = BOMBS[case]
    chunk = next(path for path in (run / where / "c").rglob("*") if path.is_file())
    chunk.write_bytes(sealed(content))
    with pytest.raises((CorruptRunError, ValueError, RuntimeError), match=r"is not a chunk of|more than any run"):
        open_array(run / where)[...]
    with pytest.raises(CorruptRunError):
        open_run(run).spectrum("parameter", config=open_run(run).config.replace(dtype_gram="float64"))
        RunStore(run).grams.read("first.weight")


@pytest.mark.parametrize("where", ["gradients/first.weight", "samples/loss", "gram/first.weight"])
def test_a_chunk_of_any_length_is_not_read(where, run):
    chunk = next(path for path in (run / where / "c").rglob("*") if path.is_file())
    with chunk.open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptRunError):
        ask(run)
    assert verify(open_run(run))


@pytest.mark.parametrize("codec", ["raw", "zstd", "blosc-lz4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 100, 255, 256, 300, 70_000])
def test_every_chunk_that_is_written_says_its_size(codec, dtype, size, tmp_path):
    stored = codecs.encode(torch.randn(2, size, generator=torch.Generator().manual_seed(size)), dtype)
    array = zarr.create_array(
        tmp_path / "a",
        shape=stored.shape,
        chunks=stored.shape,
        dtype=stored.dtype,
        fill_value=codecs.fill_value(dtype),
        compressors=codecs.compressors(codec, dtype),
    )
    for values in (stored, np.zeros_like(stored)):
        array[...] = values
        content = (tmp_path / "a/c/0/0").read_bytes() if (tmp_path / "a/c/0/0").exists() else None
        if content is not None:
            name = {"raw": "crc32c", "zstd": "zstd"}.get(codec, "blosc")
            assert unpacked_size(content, name) == stored.nbytes
        np.testing.assert_array_equal(open_array(tmp_path / "a")[...], values)


def test_a_shape_that_no_chunks_bear_out_is_refused(tmp_path):
    run = make_run(tmp_path / "run.zarr", representation="factors")
    run.eigenvectors("global", 2, block_structure="none")
    side = next(
        path.parent for path in sorted((run.path / "factors").rglob("zarr.json")) if (path.parent / "c").is_dir()
    )
    eigenvalues = run.path / "eigenvectors/global/eigenvalues"
    for folder in (side, eigenvalues):
        path = folder / "zarr.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"shape": [2**36, *content["shape"][1:]]}))
        with pytest.raises(CorruptRunError, match="lacks some of its"):
            open_array(folder, complete=True)
    path.write_text(json.dumps(content | {"shape": [2]}))
    (eigenvalues / "c" / "0").rename(eigenvalues / "c" / "7")  # as many files, and not the one
    with pytest.raises((CorruptRunError, RuntimeError), match="is missing"):
        open_array(eigenvalues, complete=True)[...]
