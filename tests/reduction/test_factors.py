"""Gradients held as factors: the same numbers as rows, however they are reduced, read or kept."""

import functools

import numpy as np
import pytest
import torch
from factored_models import MODELS, convolution, images, llama, sequences
from torch import nn

import streamfisher as sf
from streamfisher import verify
from streamfisher.blocks import assign_blocks, group_blocks
from streamfisher.errors import ConfigError, CorruptRunError, RunError
from streamfisher.reduction import NumpySum, TorchSum, factor_gram, factor_slabs, kernels
from streamfisher.runtime import read_json, write_json


def collected(path, model, samples, **options):
    settings = {"chunk_size": 4, "batch_tokens": 25, "dtype_compute": "float64"} | options
    return sf.collect(model.double(), samples, path, config=sf.SpectralConfig(**settings))


def both(tmp_path, name, **options):
    make, data = MODELS[name]
    dense = collected(tmp_path / "dense.zarr", make(), data(), representation="dense", **options)
    factored = collected(tmp_path / "factors.zarr", make(), data(), representation="factors", **options)
    assert any(factored.store.rows.representation(p) == "factors" for p in factored.parameters)
    return dense, factored


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory):
    """Return both runs of a model, made once, for tests that change nothing in them."""
    return functools.cache(lambda name: both(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize("name", MODELS)
def test_spectra_from_factors_equal_those_from_rows(runs_of, name):
    dense, factored = runs_of(name)
    for structure in ("layer", "module", "parameter", "none"):
        for center in (False, True):
            expected, found = dense.spectrum(structure, center), factored.spectrum(structure, center)
            for key, block in expected.blocks.items():
                values = found.blocks[key].eigenvalues
                assert np.abs(values - block.eigenvalues).max() <= 1e-12 * max(block.eigenvalues[0], 1e-300)


@pytest.mark.parametrize("name", MODELS)
def test_columns_of_factors_are_columns_of_rows(runs_of, name):
    dense, factored = runs_of(name)
    for parameter, size in dense.parameters.items():
        for start, stop in ((0, size), (size // 3, size // 3 + 5), (size - 1, size)):
            for rows in (None, slice(2, 9)):
                expected = dense.store.rows.columns(parameter, start, stop, rows)
                found = factored.store.rows.columns(parameter, start, stop, rows)
                np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13, err_msg=parameter)
    expected, found = dense.store.samples.per_sample("squared_norm"), factored.store.samples.per_sample("squared_norm")
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-25)


def test_the_shared_input_of_several_layers_is_stored_once(runs_of):
    _, factored = runs_of("llama")
    entry = factored.store.factors.entries(factored.store.units[0], 0)[0]
    right = {name: uses[0][1] for name, uses in entry["pairs"].items()}
    attention, mlp = "model.layers.0.self_attn.{}_proj.weight", "model.layers.0.mlp.{}_proj.weight"
    assert right[attention.format("q")] == right[attention.format("k")] == right[attention.format("v")]
    assert right[mlp.format("gate")] == right[mlp.format("up")] != right[mlp.format("down")]
    assert entry["sides"][f"{'model.embed_tokens.weight'}~L0"]["dtype"] is None


def added(folds):
    return functools.reduce(np.add, folds)


def by_every_kernel(segments, shape, n, known=0, budget=1 << 30):
    use = kernels.use_of(segments, shape, n)
    sums = {
        "slabs": lambda: NumpySum(n, known),
        "torch slabs": lambda: TorchSum(n, known, torch.device("cpu")),
    }
    found = {}
    for kind, new_sum in sums.items():
        parts = kernels.parts_of("slabs", use)
        options = {"dtype": np.dtype("float64"), "budget": budget}
        found[kind] = added(factor_slabs.slab_folds(segments, use, parts, new_sum, **options))
        one_by_one = [factor_slabs.slab_folds(segments, use, [part], new_sum, **options)[0] for part in parts]
        assert np.array_equal(added(one_by_one), found[kind])
    found["pairwise"] = factor_gram.pairwise_gram(segments, n, known=known, budget=budget)
    if use.by_token:
        parts = kernels.parts_of("tokens", use)
        found["tokens"] = added(factor_gram.token_folds(segments, use, parts, known=known))
        one_by_one = [factor_gram.token_folds(segments, use, [part], known=known)[0] for part in parts]
        assert np.array_equal(added(one_by_one), found["tokens"])
    return found


@pytest.mark.parametrize("known", [0, 6])
@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_gives_the_gram_of_the_rows(runs_of, name, known):
    dense, factored = runs_of(name)
    n = dense.n_samples
    for parameter, size in dense.parameters.items():
        if factored.store.rows.representation(parameter) == "dense":
            continue
        rows = dense.store.rows.columns(parameter, 0, size)
        expected = (rows @ rows.T)[known:]
        shape = (factored.store.rows.shape(parameter)[0], size // factored.store.rows.shape(parameter)[0])
        for kernel, found in by_every_kernel(factored.store.rows.segments(parameter), shape, n, known).items():
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12 * expected.max(), err_msg=kernel)


def test_slabs_have_the_same_bits_within_any_budget(runs_of, monkeypatch):
    monkeypatch.setattr(kernels, "PART", 8)
    monkeypatch.setattr(kernels, "_SLAB_BYTES", 1024)
    monkeypatch.setattr(kernels, "PANEL", 12)
    monkeypatch.setattr(factor_slabs, "PANEL", 12)
    _, factored = runs_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    segments, shape, n = factored.store.rows.segments(name), (24, 16), factored.n_samples
    use = kernels.use_of(segments, shape, n)
    assert use.turned == (16, 24) and kernels.parts_of("slabs", use) == [(0, 8), (8, 16), (16, 24)]
    least, whole = kernels.slab_memory(use, 8)
    assert least < whole
    found = [
        by_every_kernel(segments, shape, n, budget=budget)["slabs"] for budget in (least, (least + whole) // 2, whole)
    ]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    with pytest.raises(sf.errors.CapacityError, match=r"a slab of 11 rows formed from .* needs .* and the budget"):
        by_every_kernel(segments, shape, n, budget=least - 1)


def test_parts_of_an_embedding_are_of_columns_and_depend_on_sizes_alone(runs_of, monkeypatch):
    monkeypatch.setattr(kernels, "token_columns", lambda positions: 5)
    dense, factored = runs_of("llama")
    name = "model.embed_tokens.weight"
    segments, shape = factored.store.rows.segments(name), factored.store.rows.shape(name)
    assert kernels.parts_of("tokens", kernels.use_of(segments, shape, 11))[:2] == [(0, 5), (5, 10)]
    rows = dense.store.rows.columns(name, 0, dense.parameters[name])
    found = by_every_kernel(segments, shape, dense.n_samples)["tokens"]
    np.testing.assert_allclose(found, rows @ rows.T, rtol=1e-11, atol=1e-13)


def test_a_budget_that_holds_no_batch_reads_them_again(runs_of):
    _, factored = runs_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    segments, n = factored.store.rows.segments(name), factored.n_samples
    held = factor_gram.pairwise_gram(segments, n, budget=1 << 30)
    assert np.array_equal(held, factor_gram.pairwise_gram(segments, n, budget=1))


def test_the_cheaper_kernel_is_chosen():
    few, many = (
        kernels.kernel_operations(64, (4096, 4096), 64),
        kernels.kernel_operations(128 * 512, (4096, 4096), 128),
    )
    assert few[1] < few[0] / 50  # one position for each sample
    assert many[0] < many[1]


def test_auto_takes_the_smaller_and_leaves_small_tensors_as_rows(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 2))
    generator = torch.Generator().manual_seed(0)
    data = {"input": torch.randn(6, 3, generator=generator), "labels": torch.randn(6, 2, generator=generator)}
    run = sf.collect(model, data, tmp_path / "run.zarr", config=sf.SpectralConfig())
    assert [name for name in run.parameters if run.store.rows.representation(name) == "factors"] == ["2.weight"]
    dense = sf.collect(model, data, tmp_path / "d.zarr", config=sf.SpectralConfig(representation="dense"))
    assert run.store.bytes_on_disk() < dense.store.bytes_on_disk() / 5
    expected, found = dense.spectrum("none").global_.eigenvalues, run.spectrum("none").global_.eigenvalues
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_bf16_model_keeps_the_operands_of_autograd_exactly(tmp_path):
    model = llama().bfloat16()
    config = sf.SpectralConfig(representation="factors", chunk_size=4)
    run = sf.collect(model, sequences(), tmp_path / "run.zarr", config=config)
    segment = run.store.rows.segments("model.layers.0.mlp.up_proj.weight")[0]
    assert segment.left.dtype == segment.right.dtype == torch.bfloat16
    dense = sf.collect(
        llama().bfloat16(), sequences(), tmp_path / "d.zarr", config=sf.SpectralConfig(representation="dense")
    )
    expected, found = dense.spectrum("none").global_.eigenvalues, run.spectrum("none").global_.eigenvalues
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * expected[0])


def test_a_skipped_sample_has_no_positions(tmp_path):
    data = images()
    data["input"][5] = float("nan")
    options = {"chunk_size": 4, "on_nonfinite": "skip", "dtype_compute": "float64"}
    runs = [
        sf.collect(
            convolution().double(), data, tmp_path / held, config=sf.SpectralConfig(representation=held, **options)
        )
        for held in ("dense", "factors")
    ]
    assert list(runs[1].store.samples.skipped()) == [5]
    assert all(segment.lengths[5 - segment.start] == 0 for segment in runs[1].store.rows.segments("0.weight")[1:2])
    expected, found = (run.spectrum("none").global_.eigenvalues for run in runs)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_centered_rows_are_never_factors(tmp_path):
    run = collected(tmp_path / "run.zarr", llama(), sequences(), store_centered=True)
    assert all(run.store.rows.representation(name) == "dense" for name in run.parameters)
    with pytest.raises(ConfigError, match=r"representation='factors' .* store_centered=True use 'dense'"):
        collected(tmp_path / "other.zarr", llama(), sequences(), store_centered=True, representation="factors")


def test_a_grown_run_of_factors_equals_a_whole_one(tmp_path):
    options = {"representation": "factors"}
    collected(tmp_path / "run.zarr", llama(), sequences()[:6], **options).build_grams()
    grown = collected(tmp_path / "run.zarr", llama(), sequences(), **options)
    whole = collected(tmp_path / "whole.zarr", llama(), sequences(), **options)
    for name in whole.parameters:
        grown.build_grams()
        whole.build_grams()
        np.testing.assert_allclose(grown.gram(name), whole.gram(name), rtol=1e-11, atol=1e-13)


def test_altered_factors_are_found_named_and_computed_again(tmp_path):
    run = collected(tmp_path / "run.zarr", llama(), sequences(), representation="factors")
    before = run.spectrum("none").global_.eigenvalues
    side = run.store.rows.segments("model.layers.0.mlp.up_proj.weight")[1].left
    chunk = next(path for path in side.path.rglob("*") if path.is_file() and path.name != "zarr.json")
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(bytes(content))
    for name in run.store.gram_members:
        run.store.grams.forget(name)
    with pytest.raises(CorruptRunError, match="cannot be read"):
        sf.open_run(run.path).spectrum("none")
    problems = verify(sf.open_run(run.path), repair=True)
    assert [(p.what, p.parameter, p.first_sample) for p in problems] == [
        ("factors", "model.layers.0.mlp.up_proj.weight", segment_start(run, 1))
    ]
    again = collected(run.path, llama(), sequences(), representation="factors")
    assert not verify(again)
    assert np.array_equal(again.spectrum("none").global_.eigenvalues, before)


def segment_start(run, index):
    """Return the first sample of the unit that a segment of samples lies in."""
    start = run.store.factors.segments("model.layers.0.mlp.up_proj.weight")[index].start
    return start // run.store.chunk_rows * run.store.chunk_rows


def test_eigenvectors_and_exports_do_not_see_the_difference(tmp_path):
    dense, factored = both(tmp_path, "llama")
    expected = dense.eigenvectors("layer_0", 3, block_structure="layer")
    found = factored.eigenvectors("layer_0", 3, block_structure="layer")
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-10)
    for name, vectors in expected.tensors().items():
        assert torch.allclose(found.tensors()[name], vectors, atol=1e-9)


def test_coarser_grams_answer_what_they_can(tmp_path):
    fine = collected(tmp_path / "fine.zarr", llama(), sequences(), representation="factors")
    coarse = collected(tmp_path / "coarse.zarr", llama(), sequences(), representation="factors", gram_per="layer")
    assert set(coarse.store.gram_members) == set(group_blocks(assign_blocks(coarse.parameters, "layer")))
    for structure in ("layer", "none"):
        expected, found = fine.spectrum(structure), coarse.spectrum(structure)
        assert list(found.blocks) == list(expected.blocks)
        for key, block in expected.blocks.items():
            assert found.blocks[key].n_params == block.n_params
            np.testing.assert_allclose(found.blocks[key].eigenvalues, block.eigenvalues, rtol=1e-9, atol=1e-13)
    with pytest.raises(ConfigError, match=r"one Gram per layer.*Possible: layer, none"):
        coarse.spectrum("module")
    assert len(coarse.eigenvectors("layer_0", 2, block_structure="layer")) == 2


@pytest.mark.parametrize("name", ["llama", "convolution"])
def test_rows_of_a_unit_that_is_not_finished_are_refused_or_nan_never_zeros(tmp_path, name):
    for run in both(tmp_path, name):
        expected = {p: run.store.rows.columns(p, 0, size) for p, size in run.parameters.items()}
        gone = run.store.units[1]
        run.store.forget_unit(gone)
        again = sf.open_run(run.path)
        for parameter, size in run.parameters.items():
            missing = f"no gradients yet of samples {gone.start} to {gone.stop - 1}"
            with pytest.raises(RunError, match=missing):
                again.store.rows.columns(parameter, 0, size)
            after = again.store.rows.columns(parameter, 0, size, slice(gone.stop, None))
            assert np.array_equal(after, expected[parameter][gone.stop :])
            rows = again.store.rows.columns(parameter, 0, size, unfinished_as_nan=True)
            assert np.isnan(rows[gone.start : gone.stop]).all()
            others = np.delete(np.arange(len(rows)), np.arange(gone.start, gone.stop))
            assert np.array_equal(rows[others], expected[parameter][others])
            part = again.store.rows.columns(
                parameter, 0, 1, slice(gone.stop - 1, gone.stop + 1), unfinished_as_nan=True
            )
            assert np.isnan(part[0]).all() and np.isfinite(part[1]).all()
            if again.store.rows.representation(parameter) == "factors":
                with pytest.raises(RunError, match=missing):
                    again.store.rows.segments(parameter)


def test_token_ids_that_are_missing_are_refused_where_no_marker_says_which_chunks_there_were(tmp_path):
    _, run = both(tmp_path, "llama")
    for path in (run.path / "done").glob("rows-*.json"):
        marker = read_json(path)
        for entry in marker["factors"]:
            for side in entry["sides"].values():
                del side["chunks"]
        write_json(path, marker)
    (run.path / "factors/0/model.embed_tokens.weight~L0/000000-0000/c/0").unlink()
    with pytest.raises(CorruptRunError, match="lacks some of its 1 chunks"):
        sf.open_run(run.path).store.rows.columns("model.embed_tokens.weight", 0, 8)
