"""Datasets by the ids of the Hub, without a network: from the cache, or a sentence that says it is not there."""

import json
import socket

import pytest

from streamfisher.data import hub, load_samples
from streamfisher.errors import DataError, MissingExtraError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder of two splits as people lay them out, that `datasets` reads, and its cache in another."""
    pytest.importorskip("datasets", reason="datasets is not installed (extra `datasets`)")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    here = tmp_path / "letters"
    here.mkdir()
    for split, letter in (("train", "a"), ("test", "b")):
        records = [{"text": letter * n, "length": n} for n in range(6)]
        (here / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return here


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub.socket, "getaddrinfo", fail)


def text_of(sample):
    return bytes(sample["input_ids"].tolist()).decode()


def test_a_split_gives_its_records_and_their_numbers_without_the_empty_ones(folder):
    samples = load_samples(f"hf:{folder}:test")
    assert [text_of(sample) for sample in samples] == ["b", "bb", "bbb", "bbbb", "bbbbb"]
    assert len(load_samples(f"hf:{folder}:train", n_samples=2)) == 2
    assert len(load_samples(f"hf:{folder}:default:train")) == 5


def test_no_more_records_are_read_than_are_asked_for(folder, monkeypatch):
    import datasets

    def endless():
        yield from ({"text": "ab"} for _ in range(3))
        raise AssertionError("read on")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: endless())
    assert len(load_samples(f"hf:{folder}:train", n_samples=3)) == 3


def test_without_a_network_and_not_in_the_cache_a_sentence_says_so_at_once(folder, no_network):
    with pytest.raises(DataError, match=r"Hub cannot be reached, and nobody/nothing is not in the cache"):
        load_samples("hf:nobody/nothing:train")
    import datasets
    from huggingface_hub import constants

    assert not datasets.config.HF_HUB_OFFLINE and not constants.HF_HUB_OFFLINE  # as they were


def test_a_split_that_is_not_there_is_named(folder):
    with pytest.raises(DataError, match=r"cannot be loaded: .*validation"):
        load_samples(f"hf:{folder}:validation")
    with pytest.raises(DataError, match="there is no field 'content'"):
        load_samples(f"hf:{folder}:train", field="content")


@pytest.mark.parametrize("spec", ["hf:imdb", "hf:", "hf::train", "hf:a:b:c:d"])
def test_another_form_is_answered_with_the_right_one(spec):
    with pytest.raises(DataError, match=r"hf:ID:SPLIT or hf:ID:CONFIG:SPLIT"):
        load_samples(spec)


def test_without_datasets_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"streamfisher\[datasets\]"):
        load_samples("hf:imdb:test")
