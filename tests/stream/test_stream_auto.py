"""`stream='auto'`: layers are streamed where waves do not fit or cost more, and not where that cannot be done."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import streamfisher as sf
from streamfisher.collection import producers, runs_in_waves
from streamfisher.errors import CapacityError
from streamfisher.stream import StreamProducer


def deep_llama(layers=12):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids(n=8, tokens=32):
    return {"input_ids": torch.randint(0, 40, (n, tokens), generator=torch.Generator().manual_seed(1))}


def config(**options):
    defaults = {"chunk_size": 4, "batch_tokens": 64, "device": "cpu", "n_workers": 1, "use_deterministic": True}
    return sf.SpectralConfig(**defaults | {"stream": "auto", "representation": "dense", "hold": "disk"} | options)


def eigenvalues(run):
    return run.spectrum("none").global_.eigenvalues


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return sf.collect(deep_llama(), ids(), tmp_path_factory.mktemp("plain") / "run", config=config(stream="none"))


#: Room for the activations of one layer in a batch, and not for those of twelve.
TIGHT = "900kB"


def test_layers_are_streamed_where_the_activations_of_a_pass_do_not_fit(tmp_path, plain):
    with pytest.raises(CapacityError, match="for its activations"):
        sf.collect(deep_llama(), ids(), tmp_path / "waves", config=config(stream="none", memory_budget=TIGHT))
    run = sf.collect(deep_llama(), ids(), tmp_path / "run", config=config(memory_budget=TIGHT))
    assert run.store.manifest.layout["streamed"]
    assert np.array_equal(eigenvalues(run), eigenvalues(plain))


def test_one_wave_that_fits_is_taken(plain, tmp_path):
    run = sf.collect(deep_llama(), ids(), tmp_path / "run", config=config())
    assert not run.store.manifest.layout["streamed"]
    assert run.store.waves == plain.store.waves


@pytest.mark.parametrize("waves, streamed", [(2, False), (4, True)])
def test_many_waves_are_more_than_a_stream(tmp_path, plain, waves, streamed):
    rows = 4 * 8 * sum(plain.parameters.values())
    grams = 8 * 8**2 * len(plain.parameters)
    budget = grams + int(1.3 * rows / waves)
    run = sf.collect(deep_llama(), ids(), tmp_path / "run", config=config(disk_budget=budget))
    assert run.store.manifest.layout["streamed"] == streamed
    assert streamed or len(run.store.waves) == waves
    assert np.array_equal(eigenvalues(run), eigenvalues(plain))


class BatchLast(nn.Module):
    """A stack that cannot be replayed: between layers the samples are the last axis."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 16)
        self.layers = nn.ModuleList(_Transposed() for _ in range(12))
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x).T
        for layer in self.layers:
            x = layer(x)
        return self.last(x.T)


class _Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.tanh(self.linear(x.T)).T


def classified(n=8):
    generator = torch.Generator().manual_seed(2)
    return {
        "x": torch.randn(n, 8, generator=generator),
        "labels": torch.randint(0, 3, (n,), generator=generator),
    }


def test_a_model_that_is_no_stack_is_taken_in_waves_and_the_reason_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(producers, "streams_layers", lambda *_: True)  # as it says of models that take longer
    whole = sf.collect(BatchLast(), classified(), tmp_path / "whole", config=config())
    budget = 8 * 8**2 * len(whole.parameters) + int(1.2 * 4 * 8 * sum(whole.parameters.values()) / 4)
    path = tmp_path / "run"
    run = sf.collect(BatchLast(), classified(), path, config=config(disk_budget=budget), progress=True)
    assert not run.store.manifest.layout["streamed"]
    assert len(run.store.waves) > 3
    said = capsys.readouterr().out
    assert "Layers cannot be streamed, so waves are tried: call 0 of a layer gets a tensor of shape (16, 2)" in said
    assert np.allclose(eigenvalues(run), eigenvalues(whole), rtol=1e-6)


def test_what_neither_waves_nor_layers_can_do_is_refused_with_both_reasons(tmp_path):
    both = r"--disk-budget leaves .* Streaming layers is no way out: .* first axis is not the batch"
    with pytest.raises(CapacityError, match=both):
        sf.collect(BatchLast(), classified(), tmp_path / "run", config=config(disk_budget=18_000))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_way(tmp_path, plain, monkeypatch):
    path = tmp_path / "run"

    def stopped(stream, wave):
        if wave.index == 3:
            raise KeyboardInterrupt
        finish(stream, wave)

    finish = StreamProducer.finish
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StreamProducer, "finish", stopped)
        sf.collect(deep_llama(), ids(), path, config=config(memory_budget=TIGHT))
    assert json.loads((path / "manifest.json").read_text())["layout"]["streamed"]
    monkeypatch.setattr(producers, "model_producer", None)  # an ordinary producer would fail
    run = sf.collect(deep_llama(), ids(), path, config=config())  # now there is room for everything
    assert np.array_equal(eigenvalues(run), eigenvalues(plain))


def test_a_run_in_waves_goes_on_in_waves(plain):
    assert runs_in_waves(plain.path, config())
    assert not runs_in_waves(plain.path, config(stream="layers"))
