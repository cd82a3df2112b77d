"""A model whose weights Accelerate keeps on the CPU or on disk has the rows of the plain model, to the last bit."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from command_line import cli
from torch import nn

import streamfisher as sf
from streamfisher import load_model
from streamfisher.demo import demo_samples, load_demo_model
from streamfisher.errors import ConfigError, ModelError
from streamfisher.models import check_device_map, is_offloaded, read_device_map
from streamfisher.store import model_fingerprint


class Scale(nn.Module):
    """Holds parameters that only the generic rule can serve."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x):
        return torch.tanh(x * self.scale)


class Tied(nn.Module):
    is_causal = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.scale = Scale()
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids):
        return self.head(self.scale(self.inner(self.embedding(input_ids))))


def to_disk(model, folder):
    disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return model


def dispatched(model, folder):
    devices = {name: "cpu" for name, _ in model.named_children() if name != "layers"}
    devices |= {f"layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(model.layers))}
    return dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def checkpoint_with_a_layer_on_disk(model, folder):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with torch.device("meta"):
        empty = copy.deepcopy(model).to("meta")
    devices = {name: "cpu" for name, _ in model.named_children() if name != "layers"}
    devices |= {f"layers.{i}": "disk" if i == 2 else "cpu" for i in range(len(model.layers))}
    return load_checkpoint_and_dispatch(empty, str(folder / "pytorch_model.bin"), devices, offload_folder=str(folder))


WAYS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk_offload": to_disk,
    "dispatch_model": dispatched,
    "load_checkpoint_and_dispatch": checkpoint_with_a_layer_on_disk,
}


def rows_of(model, data, path, **options):
    config = sf.SpectralConfig(chunk_size=4, n_workers=1, guard_every=1, **options)
    run = sf.collect(model, data, path, config=config)
    return run, {name: run.store.rows.columns(name, 0, columns) for name, columns in run.parameters.items()}


@pytest.mark.parametrize("way", WAYS)
def test_rows_fingerprint_and_spectrum_are_those_of_the_plain_model(way, tmp_path):
    data = demo_samples(8, length=24)
    expected_run, expected = rows_of(load_demo_model(), data, tmp_path / "plain")
    (tmp_path / "weights").mkdir()
    model = WAYS[way](load_demo_model(), tmp_path / "weights")
    assert is_offloaded(model)
    assert model_fingerprint(model) == expected_run.manifest.model["fingerprint"]
    run, found = rows_of(model, data, tmp_path / "run")
    assert list(found) == list(expected)
    for name, rows in expected.items():
        assert rows.tobytes() == found[name].tobytes(), name
    assert run.spectrum("none").blocks["global"].trace == expected_run.spectrum("none").blocks["global"].trace
    assert all(parameter.requires_grad for parameter in model.parameters()), "handed back as it came"


def test_tied_and_generic_parameters_are_right_when_offloaded_to_the_cpu(tmp_path):
    data = {"input_ids": torch.randint(0, 11, (8, 5), generator=torch.Generator().manual_seed(1))}
    _, expected = rows_of(Tied(), data, tmp_path / "plain")
    model = Tied()
    cpu_offload(model, execution_device=torch.device("cpu"))
    _, found = rows_of(model, data, tmp_path / "run")
    assert list(found) == list(expected) == ["embedding.weight", "inner.weight", "inner.bias", "scale.scale"]
    for name, rows in expected.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), torch.from_numpy(rows), rtol=1e-5, atol=1e-7)


def test_empty_parameters_are_still_refused(tmp_path):
    with torch.device("meta"):
        model = Tied()
    with pytest.raises(ModelError, match=r"'embedding.weight' is on the meta device and has no values"):
        rows_of(model, {"input_ids": torch.ones(4, 5, dtype=torch.int64)}, tmp_path / "run")


def test_a_device_map_that_does_not_fit_is_refused_by_name(tmp_path):
    model = Tied()
    with pytest.raises(ConfigError, match=r"names 'decoder', and Tied has no such module. Its outermost .* embedding"):
        check_device_map(model, {"decoder": 0, "": "cpu"})
    with pytest.raises(ConfigError, match=r"says nothing of inner.weight, inner.bias"):
        check_device_map(model, {"embedding": "cpu", "scale": "cpu"})
    with pytest.raises(ConfigError, match=r"'everywhere' is neither a file nor one of auto, balanced"):
        read_device_map("everywhere")
    for name, text, message in (
        ("a.json", "[1]", "must hold a mapping"),
        ("b.yaml", "inner: [1]", r"'inner' is put on \[1\]"),
        ("c.json", "{", "cannot be read"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_device_map(str(tmp_path / name))
    (tmp_path / "good.yaml").write_text("inner: disk\nembedding: 0\n")
    assert read_device_map(str(tmp_path / "good.yaml")) == {"inner": "disk", "embedding": 0}


def test_the_command_line_spreads_a_model_and_gives_the_same_rows(tmp_path):
    devices = {"embed_tokens": "cpu", "embed_positions": "cpu", "norm": "cpu", "lm_head": "cpu"}
    devices |= {f"layers.{i}": "disk" if i else "cpu" for i in range(4)}
    (tmp_path / "map.json").write_text(json.dumps(devices))
    what = ["streamfisher.demo:load_demo_model", "streamfisher.demo:demo_dataset", "--samples", "4", "--quiet"]
    assert cli("collect", *what, "--out", tmp_path / "plain.zarr") == 0
    assert cli("collect", *what, "--out", tmp_path / "run.zarr", "--device-map", tmp_path / "map.json") == 0
    plain, run = (sf.open_run(tmp_path / name) for name in ("plain.zarr", "run.zarr"))
    for name, columns in plain.parameters.items():
        assert (
            plain.store.rows.columns(name, 0, columns).tobytes() == run.store.rows.columns(name, 0, columns).tobytes()
        )


def test_a_hugging_face_checkpoint_is_spread_while_it_is_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "hf")
    ids = torch.randint(1, 50, (8, 6), generator=torch.Generator().manual_seed(0))
    _, expected = rows_of(load_model(str(tmp_path / "hf")), {"input_ids": ids}, tmp_path / "plain")
    places = {"model.layers.1": "disk"}
    places |= dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    for name, devices in (("file", places), ("auto", "auto")):
        model = load_model(str(tmp_path / "hf"), device_map=devices, offload_folder=tmp_path / "offload")
        assert is_offloaded(model) == (name == "file")
        _, found = rows_of(model, {"input_ids": ids}, tmp_path / name)
        assert {key: rows.tobytes() for key, rows in found.items()} == {
            key: rows.tobytes() for key, rows in expected.items()
        }
    with pytest.raises(ConfigError, match=r"names 'model.layers.7', and LlamaForCausalLM has no such module"):
        load_model(str(tmp_path / "hf"), device_map={"model.layers.7": "cpu", "": "cpu"})
