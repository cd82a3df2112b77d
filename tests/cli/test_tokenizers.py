"""Text is encoded by the model's own tokenizer whatever names the model, and never by bytes that it does not know."""

import json

import pytest
import torch
from command_line import cli

from streamfisher import collect, load_samples, open_run
from streamfisher.data import as_tokenizer
from streamfisher.data.tokenizing import tokenize_bytes
from streamfisher.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")

WORDS = ["<unk>", *(f"word{n}" for n in range(599))]
TEXT = " ".join(WORDS[1 + n % 90] for n in range(160))
PROGRAM = """
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
import torch

def model():
    return AutoModelForCausalLM.from_pretrained("gpt2")

def adapted():
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model(), LoraConfig(r=2, target_modules=["c_attn"]))

def random(vocabulary=600):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=32, vocab_size=vocabulary))

def of_bytes():
    return random(256)

def both():
    return random(), AutoTokenizer.from_pretrained("gpt2")

def plain():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(600, 4), torch.nn.Linear(4, 600))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model of 600 words and its tokenizer, a program whose callables give such, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("words")
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    fast.save_pretrained(folder / "gpt2")
    fast.save_pretrained(folder / "words")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=32, vocab_size=600)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    (folder / "given.py").write_text(PROGRAM)
    (folder / "text.txt").write_text(TEXT)
    (folder / "lines.jsonl").write_text("\n".join(json.dumps({"text": list(range(n, n + 9))}) for n in range(4)))
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def collected(model, out, *options, data="text.txt"):
    return cli("collect", model, data, "--out", out, "--max-length", 16, "--quiet", *options)


@pytest.mark.parametrize("model", ["gpt2", "given:model", "given:adapted", "given:both"])
def test_text_is_encoded_by_the_models_own_tokenizer(model, tmp_path, capsys):
    if model == "given:adapted":
        pytest.importorskip("peft")
    assert collected(model, tmp_path / "run.zarr") == 0
    printed = capsys.readouterr()
    assert "Tokenizer: gpt2" in printed.err and "600 tokens" in printed.err
    assert "tokenizer   gpt2" in printed.out
    run = open_run(tmp_path / "run.zarr")
    facts = run.manifest.data["tokenizer"]
    assert (facts["name"], facts["n_tokens"]) == ("gpt2", 600) and "Tokenizer" in facts["class"]
    assert run.n_samples == 10  # 160 words in sequences of 16; bytes would be 65


@pytest.mark.parametrize("model", ["given:random", "given:plain"])
def test_bytes_are_refused_for_a_vocabulary_that_is_not_of_bytes(model, tmp_path, capsys):
    assert collected(model, tmp_path / "run.zarr") == 2
    message = capsys.readouterr().err
    assert "vocabulary has 600" in message and "--tokenizer FOLDER_OR_ID" in message
    assert not (tmp_path / "run.zarr").exists()
    assert collected(model, tmp_path / "run.zarr", "--tokenizer", "words") == 0
    assert open_run(tmp_path / "run.zarr").manifest.data["tokenizer"]["name"] == "words"


def test_bytes_that_are_asked_for_are_taken(tmp_path, capsys):
    assert collected("given:random", tmp_path / "run.zarr", "--tokenizer", "bytes") == 0
    assert "Tokenizer: UTF-8 bytes (256 tokens)\n" in capsys.readouterr().err


def test_a_model_of_bytes_takes_bytes_and_says_that_nobody_named_a_tokenizer(tmp_path, capsys):
    assert collected("given:of_bytes", tmp_path / "run.zarr") == 0
    assert "Tokenizer: UTF-8 bytes (256 tokens); nobody named another" in capsys.readouterr().err


def test_data_that_hold_token_ids_need_no_tokenizer(tmp_path, capsys):
    assert collected("given:random", tmp_path / "run.zarr", data="lines.jsonl") == 0
    assert "Tokenizer" not in capsys.readouterr().err
    assert "tokenizer" not in open_run(tmp_path / "run.zarr").manifest.data


def test_a_plan_counts_the_same_tokens(capsys):
    options = ("--max-length", 16, "--json", "--flops", 1e12, "--solve-flops", 1e12, "--disk", "1GB/s")
    plans = []
    for model in ("gpt2", "given:model"):
        assert cli("plan", model, "text.txt", *options) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["n_samples"] == plans[1]["n_samples"] == 10


def test_verify_deep_reads_the_same_tokens(tmp_path):
    assert collected("given:both", tmp_path / "run.zarr") == 0
    assert cli("verify", tmp_path / "run.zarr", "given:both", "text.txt", "--deep", 2, "--quiet") == 0


def test_collect_refuses_bytes_that_nobody_asked_for(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained("gpt2")
    with pytest.raises(DataError, match=r"vocabulary has 600.*tokenize=\.\.\."):
        collect(model, load_samples("text.txt", max_length=16), tmp_path / "run.zarr")
    tokenizer = transformers.AutoTokenizer.from_pretrained("words")
    run = collect(model, load_samples("text.txt", max_length=16, tokenize=tokenizer), tmp_path / "run.zarr")
    assert run.manifest.data["tokenizer"]["name"] == "words"


def test_what_turns_text_into_ids_is_a_tokenizer():
    assert as_tokenizer(None).by_default and not as_tokenizer(tokenize_bytes).by_default
    assert as_tokenizer(lambda text: [len(text)]).encode("abc") == [3]
    fast = transformers.AutoTokenizer.from_pretrained("words")
    for given in (fast, fast.backend_tokenizer):
        assert as_tokenizer(given).encode("word3 word0") == [4, 1]
    with pytest.raises(ConfigError, match="int is no tokenizer"):
        as_tokenizer(3)
    with pytest.raises(DataError, match="gives a str"):
        as_tokenizer(str.upper).encode("abc")
