"""Runs that stream: the same spectra as ordinary ones, from weights that are read layer by layer, whatever happens."""

import importlib.util
import json
import shutil
import signal
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import cli
from forked_commands import forked
from rank_processes import bytes_of, finished, launch
from safetensors.torch import load_file, save_file
from stream.stream_models import assert_same_bits, model_and_batches, ordinary_rows, streamed_rows

import streamfisher as sf
from streamfisher import load_skeleton
from streamfisher.errors import CapacityError, ConfigError, ModelError, RunMismatchError
from streamfisher.models import skeleton_is_needed
from streamfisher.stream import LayerStream, StreamProducer
from streamfisher.stream.shell import Shell

EXAMPLES = Path(__file__).parents[2] / "examples" / "stream_7b"


def config(**options):
    return sf.SpectralConfig(
        **{"chunk_size": 4, "batch_tokens": 14, "use_deterministic": True, "device": "cpu"} | options
    )


def whole_batch(name, n=10):
    model, batches, _ = model_and_batches(name, n, n)
    return model, batches[0]


def test_fewer_boundaries_are_kept_where_the_disk_is_small(tmp_path):
    model, samples = whole_batch("Llama")
    plain = sf.collect(model, samples, tmp_path / "plain", config=config())
    small = config(stream="layers", disk_budget=140_000)
    thinned = sf.collect(model, samples, tmp_path / "thinned", config=small)
    assert np.array_equal(plain.spectrum().global_.eigenvalues, thinned.spectrum().global_.eigenvalues)


def test_a_disk_without_room_for_boundaries_is_refused(tmp_path):
    model, batches, loss = model_and_batches("Llama")
    with StreamProducer(LayerStream(model, loss), lambda: batches[0]) as producer:
        producer.probe()
        producer.keep_between_waves(4 * 7 * 64 * 10, 7 * 10)
        assert producer.stream.forward_stream.keep_every == 2
        with pytest.raises(CapacityError, match=r"one boundary between layers take 4.48 kB for all samples"):
            producer.keep_between_waves(5000, 7 * 10)


def saved(model, folder):
    model.save_pretrained(folder, max_shard_size="5KB", save_original_format=False)
    return folder


@pytest.mark.parametrize("name", ["GPT-2", "T5"])
def test_a_streamed_run_has_the_bits_of_an_ordinary_one(tmp_path, name):
    model, samples = whole_batch(name)
    plain = sf.collect(model, samples, tmp_path / "plain", config=config())
    streamed = sf.collect(model, samples, tmp_path / "streamed", config=config(stream="layers"))
    assert len(plain.store.waves) == 1
    assert len(streamed.store.waves) > 3
    for parameter, columns in plain.parameters.items():
        expected = plain.store.rows.columns(parameter, 0, columns)
        assert np.array_equal(expected, streamed.store.rows.columns(parameter, 0, columns)), parameter
    one, other = plain.spectrum(), streamed.spectrum()
    for block, found in one.blocks.items():
        assert np.array_equal(found.eigenvalues, other.blocks[block].eigenvalues), block
    assert not (tmp_path / "streamed" / "stream").exists(), "boundaries are deleted"


def test_a_stream_with_another_activation_is_not_gone_on_with(tmp_path):
    model, samples = whole_batch("Llama")
    run = sf.collect(model, samples, tmp_path / "run", config=config(stream="layers"))
    for unit in run.store.units[1:]:
        run.store.forget_unit(unit)
    own = [layer.mlp.act_fn for layer in model.model.layers]
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(RunMismatchError, match="compute something else"):
        sf.collect(model, samples, tmp_path / "run", config=config(stream="layers"))
    for layer, act in zip(model.model.layers, own, strict=True):
        layer.mlp.act_fn = act
    again = sf.collect(model, samples, tmp_path / "run", config=config(stream="layers"))
    assert again.info()["complete"] and not (run.path / "stream").exists()


def test_gradients_of_a_segment_are_deleted_once_it_is_reduced(tmp_path):
    model, samples = whole_batch("Llama")
    plain = sf.collect(model, samples, tmp_path / "plain", config=config())
    streamed = sf.collect(model, samples, tmp_path / "s", config=config(stream="layers", keep_gradients=()))
    assert all(streamed.store.kept.is_deleted(name) for name in streamed.parameters)
    one, other = plain.spectrum(), streamed.spectrum()
    assert np.array_equal(one.global_.eigenvalues, other.global_.eigenvalues)


@pytest.mark.parametrize("name", ["Llama", "ALBERT", "ViT"])
def test_weights_read_segment_by_segment_give_the_same_bits(tmp_path, name):
    model, batches, loss = model_and_batches(name)
    skeleton, weights = load_skeleton(saved(model, tmp_path / "model"))
    expected = ordinary_rows(model, batches, loss)
    assert_same_bits(expected, streamed_rows(skeleton, batches, loss, weights=weights))
    assert all(parameter.is_meta for parameter in skeleton.parameters()), "nothing is left in memory"
    weights.close()


def test_a_run_on_a_skeleton_is_that_of_the_model(tmp_path):
    model, samples = whole_batch("GPT-2")
    plain = sf.collect(model, samples, tmp_path / "plain", config=config(stream="layers"))
    skeleton, weights = load_skeleton(saved(model, tmp_path / "model"))
    run = sf.collect(skeleton, samples, tmp_path / "run", config=config(stream="auto"), weights=weights)
    assert run.store.manifest.model["fingerprint"] == plain.store.manifest.model["fingerprint"]
    assert np.array_equal(run.spectrum().global_.eigenvalues, plain.spectrum().global_.eigenvalues)


def test_a_skeleton_works_as_a_model_by_itself(tmp_path):
    model, batches, _ = model_and_batches("Llama")
    skeleton, _ = load_skeleton(saved(model, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(skeleton(**batches[0]).logits, model(**batches[0]).logits)


def test_bf16_weights_are_cast_as_they_are_read(tmp_path):
    model, batches, loss = model_and_batches("Llama")
    saved(model.bfloat16(), tmp_path / "model")
    skeleton, weights = load_skeleton(tmp_path / "model", dtype=torch.float32)
    found = streamed_rows(skeleton, batches, loss, weights=weights)
    whole = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert_same_bits(ordinary_rows(whole, batches, loss), found)


def test_only_what_does_not_fit_is_read_layer_by_layer(tmp_path):
    model, _, _ = model_and_batches("Llama")
    folder = str(saved(model, tmp_path / "model"))
    assert skeleton_is_needed(folder, config(stream="auto", memory_budget=10_000))
    assert not skeleton_is_needed(folder, config(stream="auto", memory_budget=100_000))
    assert not skeleton_is_needed(folder, config(stream="none", memory_budget=10_000))
    assert not skeleton_is_needed("package.module:model", config(stream="layers"))


def test_a_budget_counts_the_most_weights_that_are_in_memory_at_a_time(tmp_path, monkeypatch):
    model, batches, loss = model_and_batches("T5")
    skeleton, weights = load_skeleton(saved(model, tmp_path / "model"))
    alive, most, read = weakref.WeakValueDictionary(), [], weights.read

    def counted(stored):
        tensors = read(stored)
        alive.update((tensor.data_ptr(), tensor) for tensor in tensors.values())
        most.append(sum(tensor.nbytes for tensor in alive.values()))
        return tensors

    monkeypatch.setattr(weights, "read", counted)
    streamed_rows(skeleton, batches, loss, weights=weights)
    counted_for = weights.within_budget(list(Shell(skeleton).layers))
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert 0.5 * counted_for < max(most) <= counted_for < whole
    weights.close()


def test_a_budget_below_the_weights_at_work_is_refused(tmp_path):
    model, samples = whole_batch("Llama")
    skeleton, weights = load_skeleton(saved(model, tmp_path / "model"))
    small = config(stream="layers", memory_budget=10_000)
    with pytest.raises(CapacityError, match=r"two layers and the code around the layers have .* of weights"):
        sf.collect(skeleton, samples, tmp_path / "run", config=small, weights=weights)
    weights.close()


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def change(folder, name, change_tensor):
    for file in shards(folder):
        tensors = load_file(file)
        if name in tensors:
            change_tensor(tensors)
            save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_tensor_is_named(tmp_path):
    folder = saved(model_and_batches("Llama")[0], tmp_path / "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"has no tensor 'model.layers.1.mlp.up_proj.weight' for the parameter of shape"
    ):
        load_skeleton(folder)


def test_a_tensor_of_another_shape_is_named_with_its_file(tmp_path):
    folder = saved(model_and_batches("Llama")[0], tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, name, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(
        ModelError, match=r"up_proj.weight' in model-.*has shape \(3, 5\), and Llama.* needs \(24, 16\)"
    ):
        load_skeleton(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = saved(model_and_batches("Llama")[0], tmp_path / "model")
    shards(folder)[1].unlink()
    with pytest.raises(ModelError, match="which is not in"):
        load_skeleton(folder)


@pytest.mark.parametrize(
    "options, message",
    [({"store_centered": True}, "store_centered=True"), ({"labels": "model"}, "labels='model' draws labels")],
)
def test_settings_that_need_the_whole_model_are_refused(tmp_path, options, message):
    model, samples = whole_batch("Llama")
    with pytest.raises(ConfigError, match=message):
        sf.collect(model, samples, tmp_path / "run", config=config(stream="layers", **options))


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example_checkpoint(folder):
    example("make_checkpoint").main(
        [str(folder), "--layers", "5", "--hidden", "256", "--vocabulary", "1300", "--shard", "2e6"]
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return example_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


TEXT = Path(__file__).parents[2] / "README.md"
OPTIONS = [
    *("--tokenizer", "bytes", "--samples", "12", "--max-length", "32", "--dtype", "float32", "--loss", "causal"),
    *("--chunk-size", "4", "--batch-tokens", "64", "--workers", "1", "--deterministic", "--quiet"),
]


def arguments(checkpoint, out, *options):
    return ["run", str(checkpoint), str(TEXT), "--out", str(out), *OPTIONS, *options]


STREAMED = ("--stream", "layers", "--memory-budget", "18MB")


@pytest.fixture(scope="module")
def undisturbed(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert cli(*arguments(checkpoint, out, *STREAMED)) == 0
    return out


def test_the_example_at_a_small_scale(checkpoint, undisturbed, tmp_path):
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    held = manifest["layout"]["representation"]
    assert {held[name] for name in held if name.endswith("proj.weight")} == {"factors"}
    assert cli(*arguments(checkpoint, tmp_path / "plain", "--keep-gradients", "all")) == 0
    one, other = (json.loads((path / "spectrum.json").read_text()) for path in (undisturbed, tmp_path / "plain"))
    assert np.allclose(one["global"]["eigenvalues"], other["global"]["eigenvalues"], rtol=1e-5)
    rows = sf.open_run(tmp_path / "plain")
    squares = sum(
        float(np.square(rows.store.rows.columns(name, 0, columns).astype(float)).sum())
        for name, columns in rows.parameters.items()
    )
    assert one["global"]["trace"] == pytest.approx(squares / 12, rel=1e-5)
    found = example("check_layer").main([str(undisturbed), str(checkpoint), str(TEXT)])
    assert len(found) == 4
    assert max(found.values()) < 1e-5


def start(checkpoint, out):
    return forked(1, ["-m", "streamfisher", *arguments(checkpoint, out, *STREAMED)])


@pytest.mark.slow
def test_sigkill_anywhere_gives_the_same_bits(checkpoint, undisturbed, tmp_path):
    out = tmp_path / "run"
    kills = 0
    for count in (0, 9, 17):  # files of done units and Grams; 0: while boundaries are made
        process = start(checkpoint, out)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            begun = (out / "stream").is_dir() if count == 0 else len(list((out / "done").glob("*"))) >= count
            if begun:
                break
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3
    process = start(checkpoint, out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert bytes_of(out) == bytes_of(undisturbed)


@pytest.mark.slow
def test_lost_boundaries_are_made_again_by_a_resumed_run(checkpoint, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = start(checkpoint, out)
    while process.poll() is None and len(list((out / "done").glob("rows.2-*"))) < 1:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (out / "stream").is_dir()
    shutil.rmtree(out / "stream")
    assert cli(*arguments(checkpoint, out, *STREAMED)) == 0
    assert bytes_of(out) == bytes_of(undisturbed)


@pytest.mark.slow
def test_two_ranks_give_the_bits_of_one(checkpoint, undisturbed, tmp_path):
    out = tmp_path / "run"
    twice = ("--stream", "layers", "--memory-budget", "36MB")  # ranks share it
    finished(launch(2, ["-m", "streamfisher", *arguments(checkpoint, out, *twice)]))
    assert bytes_of(out) == bytes_of(undisturbed)
