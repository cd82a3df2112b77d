"""A run on disk: exact bits under every codec, nothing passed off as zeros, nothing written outside its folder."""

import dataclasses
import json
import os
import warnings

import numpy as np
import pytest
import tiny_models
import torch
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from streamfisher import SpectralConfig, collect, open_run
from streamfisher.errors import CorruptRunError, RunError
from streamfisher.reduction import FOLD
from streamfisher.runtime import durable, read_json, write_json
from streamfisher.runtime.durable import sweep_partials
from streamfisher.store import PANEL, RunLock, RunStore, chunk_columns, codecs, node_name
from streamfisher.store.layout import check_free

CODECS = {
    "blosc-lz4": {"codec": "blosc-lz4"},
    "zstd": {"codec": "zstd"},
    "raw": {"codec": "raw"},
    "bfloat16": {"dtype_store": "bfloat16"},
    "float16": {"dtype_store": "float16"},
    "bitround": {"bitround": 7},
    "bfloat16 in zstd": {"dtype_store": "bfloat16", "codec": "zstd"},
}


def collected(path, model=None, samples=None, **options):
    model = tiny_models.causal() if model is None else model
    samples = tiny_models.sequences() if samples is None else samples
    return collect(model, samples, path, config=SpectralConfig(**{"chunk_size": 4, **options}))


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Return a run with float32 rows as they were computed."""
    run = collected(tmp_path_factory.mktemp("store") / "run.zarr")
    run.build_grams()
    return run


def stored_rows(run, name):
    return run.store.rows.columns(name, 0, run.parameters[name])


def rounded(rows, case):
    """Return float32 rows rounded as the case says, by torch or by integer arithmetic of the test's own."""
    tensor = torch.from_numpy(rows.copy())
    if "bfloat16" in case:
        return tensor.bfloat16().float().numpy()
    if case == "float16":
        return tensor.half().float().numpy()
    if case == "bitround":
        return bitround(rows, 7)
    return rows


def bitround(values, keep):
    """Return float32 values with `keep` mantissa bits, to nearest, ties to even."""
    bits, drop = values.copy().view(np.uint32).astype(np.uint64), 23 - keep
    half = (np.uint64(1) << np.uint64(drop - 1)) - np.uint64(1)
    bits += half + ((bits >> np.uint64(drop)) & np.uint64(1))
    bits &= ~np.uint64((1 << drop) - 1)
    return bits.astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("case", CODECS)
def test_rows_come_back_bit_for_bit_as_rounded(case, exact, tmp_path):
    run = collected(tmp_path / "run.zarr", **CODECS[case])
    for name in run.parameters:
        assert np.array_equal(stored_rows(run, name), rounded(stored_rows(exact, name), case)), name


@pytest.mark.parametrize("case", CODECS)
@pytest.mark.parametrize("center", [False, True])
def test_spectrum_agrees_with_full_precision_within_its_noise_floor(case, center, exact, tmp_path):
    run = collected(tmp_path / "run.zarr", **CODECS[case])
    for structure in ("layer", "none"):
        expected, found = (which.spectrum(structure, center) for which in (exact, run))
        for name, block in found.blocks.items():
            truth = expected.blocks[name].eigenvalues
            above = block.above_floor
            assert above.any()
            error = np.abs(block.eigenvalues - truth)
            # One percent of an eigenvalue at the floor, and less above it in proportion to its square root (Weyl).
            assert (error[above] <= 0.1 * np.sqrt(block.noise_floor * truth[above])).all(), (name, error / truth)
            assert (error[~above] <= 2 * block.noise_floor).all()


@pytest.mark.parametrize("case", ["blosc-lz4", "zstd", "raw"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float64", 8)])
def test_chunks_are_compressed_as_named_and_end_in_a_checksum(case, dtype, size, tmp_path):
    run = collected(tmp_path / "run.zarr", codec=case, dtype_store=dtype)
    metadata = zarr.open_array(run.path / "gradients/head.weight", mode="r").metadata
    *compressors, last = [codec for codec in metadata.codecs if not type(codec).__name__.startswith("Bytes")]
    assert isinstance(last, Crc32cCodec)
    if case == "blosc-lz4":
        (blosc,) = compressors
        assert isinstance(blosc, BloscCodec)
        assert (blosc.cname.value, blosc.shuffle.value, blosc.typesize) == ("lz4", "bitshuffle", size)
    elif case == "zstd":
        assert [type(codec) for codec in compressors] == [ZstdCodec]
    else:
        assert compressors == []


def test_blosc_shrinks_what_rounding_made_regular(tmp_path):
    sizes = {}
    for case in ("raw", "blosc-lz4", "bitround"):
        run = collected(tmp_path / f"{case}.zarr", **CODECS[case])
        sizes[case] = sum(path.stat().st_size for path in (run.path / "gradients").rglob("c/*/*"))
    assert sizes["bitround"] < sizes["blosc-lz4"] < sizes["raw"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_encoding_keeps_signs_zeros_and_extremes(dtype):
    values = torch.tensor([[0.0, -0.0, 1.0, -1.5, torch.finfo(dtype).max, torch.finfo(dtype).tiny, float("inf")]])
    stored = codecs.encode(values.to(dtype), dtype)
    assert stored.dtype == codecs.stored_dtype(dtype)
    back = torch.from_numpy(codecs.decode(stored, dtype).copy())
    assert torch.equal(back.to(dtype).view(torch.uint8), values.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_fill_value_decodes_to_nan(dtype):
    stored = np.full((1, 2), codecs.fill_value(dtype), dtype=codecs.stored_dtype(dtype))
    assert np.isnan(codecs.decode(stored, dtype)).all()


def without_chunk_digests(run):
    """Make the markers those of a run that does not say which chunks belong where."""
    for path in (run.path / "done").glob("rows-*.json"):
        write_json(path, {key: value for key, value in read_json(path).items() if key != "chunks"})


def test_chunks_that_were_exchanged_are_not_read_although_each_is_whole(tmp_path):
    run = collected(tmp_path / "run.zarr", chunk_size=2)
    first, second = (run.path / f"gradients/norm.bias/c/{unit}/0" for unit in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(CorruptRunError, match=r"chunks of norm\.bias, samples 0 to 1.*verify"):
        open_run(run.path).build_grams()


@pytest.mark.parametrize("options", [{}, {"dtype_store": "bfloat16"}, {"dtype_store": "float16"}, {"bitround": 9}])
def test_missing_chunk_is_refused_also_where_no_marker_says_which_chunks_there_were(options, tmp_path):
    run = collected(tmp_path / "run.zarr", **options)
    (run.path / "gradients/norm.bias/c/1/0").unlink()
    with pytest.raises(CorruptRunError, match=r"norm\.bias, samples 4 to 5.*verify"):
        open_run(run.path).build_grams()
    without_chunk_digests(run)
    assert np.isfinite(open_run(run.path).store.rows.columns("norm.bias", 0, 4, slice(0, 4))).all()
    with pytest.raises(CorruptRunError, match=r"a chunk of norm\.bias, samples 4 to 5, is missing.*verify"):
        stored_rows(open_run(run.path), "norm.bias")
    with pytest.raises(CorruptRunError, match=r"norm\.bias.*samples 4 to 5.*verify"):
        open_run(run.path).build_grams()


def test_rows_that_read_well_but_were_altered_are_refused_by_their_norms(tmp_path):
    run = collected(tmp_path / "run.zarr")
    zarr.open_array(run.path / "gradients/norm.bias", mode="r+")[3] *= 1.01
    without_chunk_digests(run)
    with pytest.raises(CorruptRunError, match=r"norm\.bias.*samples 3\).*verify"):
        open_run(run.path).build_grams()


def test_damaged_chunk_is_not_read(tmp_path):
    run = collected(tmp_path / "run.zarr")
    path = run.path / "gradients/head.weight/c/0/0"
    content = bytearray(path.read_bytes())
    content[30] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptRunError, match=r"head\.weight.*verify"):
        stored_rows(open_run(run.path), "head.weight")


def test_unit_without_a_marker_does_not_count(tmp_path):
    run = collected(tmp_path / "run.zarr")
    (run.path / "done/rows-000001.json").unlink()
    again = open_run(run.path)
    assert again.store.markers.done_units() == {0}
    assert [unit.index for unit in again.store.markers.todo()] == [1]
    assert again.info()["samples_done"] == 4 and not again.info()["complete"]
    with pytest.raises(RunError, match="4 of 6 samples"):
        again.spectrum()


def test_partial_marker_of_an_interrupted_write_does_not_count(tmp_path):
    run = collected(tmp_path / "run.zarr")
    marker = run.path / "done/rows-000001.json"
    marker.rename(marker.with_name("rows-000001.json.123.partial"))
    assert open_run(run.path).store.markers.done_units() == {0}
    assert sweep_partials(run.path) == 1


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    order = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("flushed"), fsync(file)))

    def crash(self, target):
        order.append("moved")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"a": 2})
    assert order == ["flushed", "moved"]
    assert read_json(path) == {"a": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json"]  # an interrupt leaves nothing behind
    write_json(path, {"a": 3})
    assert read_json(path) == {"a": 3}


def test_json_that_is_not_strict_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize("content", ["", '{"a": ', "\x00"])
def test_torn_json_is_corruption(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CorruptRunError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(CorruptRunError, match=r"b\.json is missing"):
        read_json(tmp_path / "b.json")


NAMES = ["layer.0.weight", "..", ".", "...", "a/b", "../../etc/passwd", "/root", "__x", "__init__", "zarr.json"]
NAMES += ["a b", "ä.weight", "a%2Fb", "a\\b", "c", "a\nb", "con:1"]


@pytest.mark.parametrize("name", NAMES)
def test_node_name_stays_in_its_folder(name, tmp_path):
    node = node_name(name)
    assert "/" not in node and node not in ("", ".", "..", "zarr.json") and not node.startswith("__")
    assert (tmp_path / node).resolve().parent == tmp_path.resolve()


def test_node_names_are_distinct():
    assert len({node_name(name) for name in NAMES}) == len(NAMES)


def test_parameters_of_awkward_names_are_stored_and_read(tmp_path):
    class Awkward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_module("zarr", torch.nn.ParameterDict({"json": torch.ones(3), "a/b": torch.ones(3)}))
            self.register_module("__x", torch.nn.Linear(3, 1, bias=False))

        def forward(self, x):
            return getattr(self, "__x")(x * self.zarr["json"] + self.zarr["a/b"])

    run = collected(tmp_path / "run.zarr", Awkward(), {"x": torch.randn(5, 3), "labels": torch.randn(5, 1)})
    assert set(run.parameters) == {"zarr.json", "zarr.a/b", "__x.weight"}
    assert np.isfinite(run.spectrum("parameter").global_.trace)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.zarr"]


def change_manifest(run, **changes):
    manifest = read_json(run.path / "manifest.json")
    write_json(run.path / "manifest.json", manifest | changes)


def test_manifest_of_another_format_version_is_refused(tmp_path):
    run = collected(tmp_path / "run.zarr")
    change_manifest(run, format_version=99)
    with pytest.raises(CorruptRunError, match=r"version 99.*reads 1.*use the version that wrote it"):
        open_run(run.path)


def test_manifest_that_lacks_a_field_is_refused(tmp_path):
    run = collected(tmp_path / "run.zarr")
    manifest = read_json(run.path / "manifest.json")
    del manifest["layout"]
    write_json(run.path / "manifest.json", manifest)
    with pytest.raises(CorruptRunError, match="lacks layout"):
        open_run(run.path)


@pytest.mark.parametrize("kind", ["causal", "regression"])
def test_rows_stored_centered_give_the_same_spectra(kind, tmp_path):
    model = getattr(tiny_models, kind)().double()
    samples = tiny_models.sequences() if kind == "causal" else tiny_models.vectors()
    runs = [
        collected(tmp_path / f"{centered}.zarr", model, samples, store_centered=centered, dtype_gram="float64")
        for centered in (False, True)
    ]
    mean = sum(np.abs(stored_rows(runs[1], name).mean(axis=0)).max() for name in runs[1].parameters)
    assert mean < 1e-14
    for structure in ("layer", "none"):
        for center in (False, True):
            plain, centered = (run.spectrum(structure, center).global_.eigenvalues for run in runs)
            np.testing.assert_allclose(centered, plain, rtol=1e-9, atol=1e-12 * plain[0])


def test_skipped_samples_do_not_enter_a_stored_mean(tmp_path):
    model = tiny_models.regression().double()
    samples = {key: value.double() for key, value in tiny_models.vectors(nan_at=5).items()}
    options = {"on_nonfinite": "skip", "dtype_gram": "float64"}
    runs = [
        collected(tmp_path / f"{centered}.zarr", model, samples, store_centered=centered, **options)
        for centered in (False, True)
    ]
    assert (stored_rows(runs[1], "first.weight")[5] == 0).all()
    for center in (False, True):
        plain, centered = (run.spectrum("none", center).global_.eigenvalues for run in runs)
        np.testing.assert_allclose(centered, plain, rtol=1e-9, atol=1e-12 * plain[0])


def test_any_zarr_reader_reads_the_arrays_with_their_dimensions(exact):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(exact.path, mode="r")
    weight = group["gradients/head.weight"]
    assert weight.metadata.dimension_names == ("sample", "element of head.weight")
    assert dict(weight.attrs)["parameter_shape"] == [256, 4]
    assert np.array_equal(weight[...], stored_rows(exact, "head.weight"))
    assert group["samples/loss"].metadata.dimension_names == ("sample",)
    assert group["samples/squared_norm"].metadata.dimension_names == ("sample", "parameter")
    norms = (weight[...].astype(np.float64) ** 2).sum(axis=1)
    column = dict(group["samples/squared_norm"].attrs)["parameters"].index("head.weight")
    np.testing.assert_allclose(group["samples/squared_norm"][:, column], norms, rtol=1e-5)
    assert group["samples/n_targets"][...].tolist() == [4] * 6
    assert group["samples/valid"][...].tolist() == [1] * 6
    gram = group["gram/head.weight"]
    assert gram.metadata.dimension_names == ("sample", "sample_j")
    assert gram.dtype == np.float64
    np.testing.assert_allclose(gram[...].diagonal(), norms, rtol=1e-6)


def test_bfloat16_rows_say_what_their_bits_mean(tmp_path):
    run = collected(tmp_path / "run.zarr", dtype_store="bfloat16")
    array = zarr.open_array(run.path / "gradients/head.bias", mode="r")
    assert array.dtype == np.uint16 and dict(array.attrs)["logical_dtype"] == "bfloat16"
    decoded = (array[...].astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(decoded, stored_rows(run, "head.bias"))


@pytest.mark.parametrize(
    ("columns", "samples", "rows", "itemsize"),
    [(10, 6, 4, 4), (10**6, 256, 32, 4), (10**8, 1024, 32, 2), (10**8, 10**6, 32, 4), (5000, 1, 1, 8)],
)
def test_chunks_are_whole_panels_of_bounded_size(columns, samples, rows, itemsize):
    width = chunk_columns(columns, samples, rows, itemsize)
    assert width == columns or width % (FOLD if width > FOLD else PANEL) == 0
    assert 0 < width <= columns
    assert width <= PANEL or (width * rows * itemsize <= 16 << 20 and width * samples * 4 <= 256 << 20)
    small = chunk_columns(columns, samples, rows, itemsize, 4 << 30)
    assert small <= PANEL or small * samples * 4 <= 64 << 20


def test_second_writer_is_refused_until_the_first_is_done(tmp_path):
    with RunLock(tmp_path), pytest.raises(RunError, match=f"process {os.getpid()} on"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path):
        pass


def test_lock_of_unknown_holder_is_refused_too(tmp_path):
    with RunLock(tmp_path) as held:
        held.path.write_text("")
        with pytest.raises(RunError, match="another process"), RunLock(tmp_path):
            pass


def test_remains_of_an_unfinished_creation_are_used_again(tmp_path, exact):
    run = collected(tmp_path / "run.zarr")
    (run.path / "manifest.json").unlink()
    for marker in (run.path / "done").iterdir():
        marker.unlink()
    again = collected(tmp_path / "run.zarr")
    assert again.info()["complete"]
    assert np.array_equal(stored_rows(again, "head.weight"), stored_rows(exact, "head.weight"))


def test_empty_folder_can_become_a_run(tmp_path):
    (tmp_path / "run.zarr").mkdir()
    check_free(tmp_path / "run.zarr")
    assert collected(tmp_path / "run.zarr").info()["complete"]


def test_store_is_opened_again_by_its_path_in_workers(exact):
    import pickle

    exact.store.fsync = True
    again = pickle.loads(pickle.dumps(exact.store))
    assert isinstance(again, RunStore) and again.path == exact.store.path and again.fsync
    rows = pickle.loads(pickle.dumps(exact.store.rows))
    for source in (again.rows, rows):
        assert np.array_equal(source.columns("norm.bias", 0, 4), exact.store.rows.columns("norm.bias", 0, 4))
    assert rows.run.fsync


def test_manifest_holds_nothing_but_json(exact):
    facts = dataclasses.asdict(exact.manifest)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert durable.read_json(exact.path / "manifest.json") == facts
