"""What a user typed nearly right, or what goes nearly well, is answered with what to write instead."""

import io
import sys

import numpy as np
import pytest
import tiny_models
import torch
from command_line import cli

import streamfisher as sf
from streamfisher.config.dtypes import parse_dtype
from streamfisher.errors import ConfigError, DataError, ModelError
from streamfisher.models import load_model
from streamfisher.runtime import bars

MODEL, DATA = "tiny_models:causal", "tiny_models:sequences"


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path):
    return sf.collect(tiny_models.causal(), tiny_models.sequences(), tmp_path / "run.zarr")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["run", "--smaples", "3"], "Did you mean --samples?"),
        (["run", MODEL, DATA, "--dtpye=bf16"], "Did you mean --dtype?"),
        (["spectrm", "run.zarr"], "Did you mean spectrum?"),
        (["info", "run.zarr", "more"], "unrecognized arguments: more."),
        (["run", "--samples", "x"], "invalid int value: 'x'. See `streamfisher run --help`"),
    ],
)
def test_a_typo_is_answered_in_a_line(words, meant, capsys):
    assert cli(*words) == 2
    message = capsys.readouterr().err
    assert meant in message and message.count("\n") == 1


def test_fewer_samples_than_a_run_has_are_those_of_a_spectrum(run, capsys):
    assert cli("collect", MODEL, DATA, "--out", "run.zarr", "--samples", 4, "--quiet") == 2
    assert "streamfisher spectrum run.zarr --samples 0:4" in capsys.readouterr().err


def test_a_condition_says_how_many_samples_meet_it(run, capsys):
    losses = np.sort(run.store.samples.per_sample("loss"))
    assert cli("spectrum", run.path, "--samples", f"loss>{losses[2]:.6f}", "--quiet", "--json") == 0
    assert f"--samples loss>{losses[2]:.6f}: 3 of 6 samples" in capsys.readouterr().err


def test_the_global_spectrum_has_no_eigenvectors_and_it_is_said_which_has(run):
    with pytest.raises(ConfigError, match=r"union of the blocks' eigenvalues.*--blocks none"):
        run.eigenvectors("global", 2)
    with pytest.raises(ConfigError, match=r"there is no block 'emedding'.*Did you mean 'embedding'\?"):
        run.spectral_density("emedding")


@pytest.mark.parametrize(
    ("pattern", "meant"), [("head", r"'\*head\*' matches 2 of them"), ("*hed*", r"Did you mean '\*head\*'\?")]
)
def test_a_pattern_that_is_part_of_names_is_answered_with_stars(pattern, meant):
    with pytest.raises(ModelError, match=meant):
        sf.collect(tiny_models.causal(), tiny_models.sequences(), "a.zarr", config=sf.SpectralConfig(include=[pattern]))


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtypes_have_short_names(name, dtype):
    assert parse_dtype(name) == dtype
    assert sf.SpectralConfig(dtype_model=name).to_dict()["dtype_model"] == str(dtype).removeprefix("torch.")


def hub_model(kind, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=256)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 256, "max_position_embeddings": 8}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def ids(*lengths):
    return [{"input_ids": torch.arange(length)} for length in lengths]


@pytest.mark.parametrize("lengths", [(12, 12, 12), (8, 8, 8, 8, 8, 12)])
def test_samples_beyond_a_table_of_positions_are_refused(lengths):
    with pytest.raises(DataError, match=r"has 12 tokens, and the model's config names 8 positions.*--max-length 8"):
        sf.collect(hub_model("gpt2"), ids(*lengths), "a.zarr")


def test_samples_beyond_rotary_positions_are_warned_of():
    with pytest.warns(UserWarning, match=r"sample 1 has 12 tokens.*names 8 positions.*--max-length 8"):
        sf.collect(hub_model("llama"), ids(8, 12, 9), "a.zarr")


def test_a_misspelt_folder_is_said_to_be_none(tmp_path, monkeypatch):
    hub_model("gpt2").save_pretrained(tmp_path / "models/tiny-gpt2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, meant in (("models/tiny-gtp2", "models/tiny-gpt2"), ("modles/tiny-gpt2", "models/tiny-gpt2")):
        with pytest.raises(ModelError, match=rf"no folder {name} here \(did you mean {meant}\?\)"):
            load_model(name)


def test_a_folder_of_an_adapter_is_loaded_with_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    hub_model("llama").save_pretrained("base")
    base = load_model("base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained("adapter")
    np.save("ids.npy", np.arange(32).reshape(4, 8))
    assert cli("collect", "adapter", "ids.npy", "--out", "run.zarr", "--quiet") == 0
    run = sf.open_run("run.zarr")
    assert len(run.parameters) == 2 and all("lora_" in name for name in run.parameters)
    given = adapted.state_dict()
    loaded = load_model("adapter").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in given.items())


class Split(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return {"input_ids": torch.arange(5)}

    def __len__(self):
        return 3


def test_a_dict_of_splits_is_refused_by_their_names():
    splits = {"train": Split(), "test": Split()}
    for call in (
        lambda: sf.collect(tiny_models.causal(), splits, "a.zarr"),
        lambda: sf.FisherSpectral().compute_fisher_spectrum(tiny_models.causal(), splits),
    ):
        with pytest.raises(DataError, match=r"splits train, test; give one of them: samples\['train'\]"):
            call()


@pytest.mark.parametrize("config", [{}, {"seed": 3}])
def test_a_config_that_is_a_dict_is_refused(config, run):
    for call in (
        lambda: sf.collect(tiny_models.causal(), tiny_models.sequences(), "a.zarr", config=config),
        lambda: sf.FisherSpectral(config),
        lambda: run.spectrum(config=config),
        lambda: run.build_grams(config),
    ):
        with pytest.raises(ConfigError, match=r"SpectralConfig\(\*\*config\)"):
            call()


def test_a_plan_before_a_run_is_three_lines_and_whole_if_asked(capsys):
    assert cli("collect", MODEL, DATA, "--out", "a.zarr") == 0
    short = capsys.readouterr().err
    assert "TinyCausal, 2,312 parameters; 6 samples" in short and "1 pass over the data" in short
    assert "Taken:" not in short
    assert cli("collect", MODEL, DATA, "--out", "b.zarr", "--verbose") == 0
    assert "Taken:" in capsys.readouterr().err


def test_grams_that_are_made_again_alike_are_bit_identical(run, capsys):
    run.build_grams()
    assert cli("gram", run.path, "--rebuild", "--quiet") == 0
    assert "they are bit-identical" in capsys.readouterr().out


def test_quiet_switches_off_the_bars_of_transformers(run, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    calls = []
    monkeypatch.setattr(transformers.utils.logging, "disable_progress_bar", lambda: calls.append(1))
    assert cli("info", run.path) == 0
    assert not calls
    assert cli("info", run.path, "--quiet") == 0
    assert calls


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    file = io.StringIO()
    with bars.Bar(total=100, desc="Gram", unit="tile", file=file) as bar:
        for _ in range(100):
            now[0] += 1.0
            bar.update(1)
            bar.refresh()
    lines = file.getvalue().splitlines()
    assert len(lines) == 4  # after 30, 60 and 90 seconds, and at the end
    assert lines[0].startswith("Gram:  30% 30/100 tiles") and lines[-1].startswith("Gram: 100% 100/100 tiles")
    assert "\r" not in file.getvalue()
    file = io.StringIO()
    with bars.Bar(total=3, file=file) as bar:
        bar.update(3)
    assert file.getvalue() == ""
    file = Terminal()
    with bars.Bar(total=3, file=file) as bar:
        bar.update(3)
    assert "\r" in file.getvalue()
