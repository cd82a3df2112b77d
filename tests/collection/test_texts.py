"""What samples say is stored where it is asked for, shown beside their numbers, and never given to the model."""

import json

import numpy as np
import pytest
import torch
from command_line import cli
from tiny_models import TinyCausal, TinyRegression, sequences, vectors

import streamfisher as sf
from streamfisher.errors import ConfigError, DataError

LINES = ["the first  line\nof text", "a second one", "and the third, which is longer", "four", "five ä", "six"]


def config(length=10, **options):
    return sf.SpectralConfig(store_text=length, chunk_size=2, **options)


def collected(path, lines=LINES, **options):
    return sf.collect(TinyCausal(), sf.text_samples(lines, sf_bytes), path, config=config(**options))


def sf_bytes(text):
    return list(text.encode())


class Decoder:
    """A tokenizer of bytes that can go back."""

    name_or_path = "of bytes"

    def __call__(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def texts(lines=LINES):
    return sf.text_samples(lines, Decoder())


@pytest.fixture
def run(tmp_path):
    return sf.collect(TinyCausal(), texts(), tmp_path / "run.zarr", config=config())


def test_token_ids_are_decoded_and_cut(run):
    assert run.texts == ("the first ", "a second o", "and the th", "four", "five ä", "six")
    assert run.samples(top=2).texts == run.texts
    assert sf.verify(run) == []


def test_a_text_beside_the_numbers_is_taken_as_it_is(tmp_path):
    data = [{"x": x, "labels": y, "text": line} for x, y, line in zip(*vectors(6).values(), LINES, strict=True)]
    with pytest.warns(UserWarning, match="left out of the samples, as no numbers: text"):
        run = sf.collect(TinyRegression(), data, tmp_path / "run.zarr", config=config(100))
    assert run.texts[0] == "the first line of text" and run.texts[2] == LINES[2]


def test_a_token_comes_with_what_is_before_it_and_a_class_with_its_input(tmp_path):
    options = {"sample_unit": "token", "tokens_per_sequence": 2}
    run = sf.collect(TinyCausal(), texts(), tmp_path / "tokens.zarr", config=config(4, **options))
    assert len(run.texts) == 12 and all(0 < len(text) <= 4 for text in run.texts)
    assert all(any(text in " ".join(line.split()) for line in LINES) for text in run.texts if "\ufffd" not in text)
    options |= {"labels": "expected", "classes_per_sample": 3}
    classes = sf.collect(TinyCausal(), texts(), tmp_path / "classes.zarr", config=config(4, **options))
    assert classes.texts == tuple(np.repeat(run.texts, 3))


def test_a_run_that_grows_has_the_texts_of_all(tmp_path):
    run = sf.collect(TinyCausal(), texts(LINES[:4]), tmp_path / "run.zarr", config=config())
    assert run.add(TinyCausal(), texts()).texts[3:] == ("four", "five ä", "six")
    run = sf.collect(TinyCausal(), texts(LINES[:4]), tmp_path / "other.zarr", config=config())
    grown = sf.collect(TinyCausal(), texts(), run.path, config=sf.SpectralConfig(chunk_size=2))  # without
    assert grown.texts == (*run.texts, "", "")


def test_what_has_no_text_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"the tokenizer sf_bytes has no decode\(\)"):
        collected(tmp_path / "run.zarr")
    with pytest.raises(ConfigError, match="no tokenizer is known"):
        sf.collect(TinyCausal(), sequences(), tmp_path / "run.zarr", config=config())
    with pytest.raises(ConfigError, match="sample 0 has neither text nor token ids"):
        sf.collect(TinyRegression(), vectors(4), tmp_path / "run.zarr", config=config())
    assert not (tmp_path / "run.zarr").exists()


def test_altered_texts_are_found_and_written_again(run):
    path = run.path / "texts.json"
    path.write_text(path.read_text().replace("four", "flour"))
    (problem,) = sf.verify(run, repair=True)
    assert problem.what == "texts" and not path.exists() and run.texts is None
    assert sf.collect(TinyCausal(), texts(), run.path, config=config()).texts[3] == "four"


def test_from_the_command_line_to_tables(tmp_path, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "run.zarr"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    where = ("tiny_models:causal", data, "--out", out, "--chunk-size", 2, "--quiet", "--blocks", "none")
    assert cli("run", *where, "--store-text", 12) == 0
    assert cli("samples", out, "--out", tmp_path / "samples.csv") == 0
    assert "and the thir" in capsys.readouterr().out and "a second one" in (tmp_path / "samples.csv").read_text()
    assert cli("influence", out, "--queries", "0:2", "--damping", "0.1", "--relative") == 0
    printed = capsys.readouterr().out
    assert "and the thir" in printed and "query 1 (a second one), highest" in printed
    lines = tmp_path / "others.txt"
    lines.write_text("\n".join("uvwxyz"))
    assert cli("samples", out, "--texts", lines) == 0  # what is given now counts
    assert "and the thir" not in capsys.readouterr().out
    with pytest.raises(DataError, match="5 texts were given and the run has 6 samples"):
        sf.open_run(out).samples(texts=LINES[:5])
    assert torch.equal(sf.load_samples(str(data))[3]["input_ids"], torch.tensor(list(b"four")))
