"""Samples in the forms that people hold them in, from Python and from files."""

import gzip
import json

import numpy as np
import pytest
import tiny_models
import torch
from command_line import cli
from torch.utils.data import DataLoader, TensorDataset

import streamfisher as sf
from streamfisher.data import Samples
from streamfisher.errors import DataError

X, Y = torch.arange(18.0).reshape(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
IDS = torch.arange(30).reshape(6, 5)
RECORDS = [{"text": "abc" * (n + 1), "source": n % 2, "score": n / 4, "name": f"n{n}"} for n in range(6)]


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def frame():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"x": list(X.numpy()), "labels": Y.numpy(), "name": list("abcdef")})


SOURCES = {
    "TensorDataset": lambda: TensorDataset(X, Y),
    "pairs": lambda: list(zip(X, Y, strict=True)),
    "DataLoader of a TensorDataset": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "frame": frame,
    "dataset with columns of text": lambda: [
        {"x": x.tolist(), "labels": int(y), "text": "abc", "tags": ["a", "b"], "missing": None}
        for x, y in zip(X, Y, strict=True)
    ],
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.filterwarnings("ignore:left out of the samples")
def test_samples_are_those_of_a_dict_of_tensors(kind, tmp_path):
    expected = sf.collect(linear(), {"x": X, "labels": Y}, tmp_path / "a.zarr").spectrum("none").global_
    run = sf.collect(linear(), SOURCES[kind](), tmp_path / "b.zarr")
    np.testing.assert_array_equal(run.spectrum("none").global_.eigenvalues, expected.eigenvalues)


def test_whole_numbers_of_a_tensor_dataset_are_token_ids():
    assert Samples(TensorDataset(IDS))[2]["input_ids"].tolist() == IDS[2].tolist()


def test_columns_of_text_are_named_once():
    samples = Samples([{"input_ids": [1, 2, 3], "text": "abc"}] * 4)
    with pytest.warns(UserWarning, match="left out of the samples, as no numbers: text") as seen:
        assert [list(samples[index]) for index in range(4)] == [["input_ids"]] * 4
    assert len(seen) == 1


@pytest.mark.parametrize("source", [["abc", "def"], [{"text": "abc"}] * 2])
def test_text_alone_is_refused_with_what_makes_samples_of_it(source):
    with pytest.raises(DataError, match=r"streamfisher\.text_samples\(texts, tokenizer\)"):
        Samples(source)[0]


def test_texts_become_samples_by_a_tokenizer(tmp_path):
    samples = sf.text_samples(["abc", "defgh"], None, max_length=4)
    assert [sample["input_ids"].tolist() for sample in samples] == [[97, 98, 99], [100, 101, 102, 103]]
    run = sf.collect(tiny_models.causal(), samples, tmp_path / "run.zarr")
    assert run.manifest.data["tokenizer"]["name"] == "UTF-8 bytes"
    words = sf.text_samples(["a b", "c d e"], lambda text: [len(word) for word in text.split()])
    assert [len(sample["input_ids"]) for sample in words] == [2, 3]
    for texts, message in (("abc", "one string"), ([], "no texts"), (["a", 3], "text 1 is a int"), ([""], "no token")):
        with pytest.raises(DataError, match=message):
            sf.text_samples(texts, None)


def as_json_lines():
    return "\n".join(map(json.dumps, RECORDS)).encode()


def write_zst(path):
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(as_json_lines())


def write_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)


def write_arrow(path, kind="new_file"):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.OSFile(str(path), "wb") as sink, getattr(pyarrow.ipc, kind)(sink, table.schema) as writer:
        writer.write_table(table)


FILES = {
    "a.jsonl": lambda path: path.write_bytes(as_json_lines()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(as_json_lines())),
    "a.jsonl.zst": write_zst,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "stream.arrow": lambda path: write_arrow(path, "new_stream"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_records_is_read_with_its_numbers_as_fields(name, tmp_path, capsys):
    FILES[name](tmp_path / name)
    samples = sf.load_samples(str(tmp_path / name), max_length=8)
    assert [sample["input_ids"].tolist() for sample in samples] == [list(r["text"].encode())[:8] for r in RECORDS]
    run = sf.collect(tiny_models.causal(), samples, tmp_path / "run.zarr")
    fields = run.store.samples.fields()
    assert fields["source"].tolist() == [0, 1] * 3 and fields["score"].tolist() == [n / 4 for n in range(6)]
    assert "name" not in fields
    assert cli("spectrum", tmp_path / "run.zarr", "--samples", "source==1", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["n_samples"] == 3


def test_numbers_that_some_records_lack_are_no_fields(tmp_path):
    lines = (
        '{"text": "abc", "a": 1, "b": 2, "c": 3}\n{"text": "abcd", "b": null, "c": 4}\n{"text": "de", "a": 1, "c": 5}'
    )
    (tmp_path / "a.jsonl").write_text(lines)
    assert sf.load_samples(str(tmp_path / "a.jsonl")).numbers == {"c": [3.0, 4.0, 5.0]}


@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("ids", [False, True])
def test_numbers_of_records_are_no_input_of_the_model_whatever_they_are_called(tmp_path, unit, ids):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=256))
    called = {"labels": 1, "position_ids": 2, "attention_mask": 0, "use_cache": True, "past_key_values": 4.5}
    plain = [{"text": list(r["text"].encode()) if ids else r["text"]} for r in RECORDS]
    runs = []
    for name, more in (("plain", {}), ("called", called)):
        lines = [json.dumps(record | {key: value + n for key, value in more.items()}) for n, record in enumerate(plain)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        samples = sf.load_samples(str(tmp_path / f"{name}.jsonl"))
        config = sf.SpectralConfig(sample_unit=unit, use_deterministic=True)
        runs.append(sf.collect(model, samples, tmp_path / f"{name}.zarr", config=config))
    first, second = (run.spectrum("none").global_.eigenvalues for run in runs)
    assert np.array_equal(first, second)
    assert runs[0].manifest.data["fingerprint"] == runs[1].manifest.data["fingerprint"]  # so one goes on as the other
    fields = runs[1].store.samples.fields()
    assert set(fields) == {*called, "loss", "n_targets"} and len(fields["labels"]) == runs[1].n_samples
    assert sorted(set(fields["labels"].tolist())) == [1.0 + n for n in range(len(RECORDS))]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_file_that_is_none_is_refused(name, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"nothing of that kind")
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        sf.load_samples(str(tmp_path / name))


def test_fields_are_not_given_to_a_hugging_face_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=256)
    model = transformers.LlamaForCausalLM(config)
    with_fields = [{"input_ids": ids, "source": torch.tensor(n)} for n, ids in enumerate(IDS)]
    runs = [sf.collect(model, data, tmp_path / f"{n}.zarr") for n, data in enumerate(({"input_ids": IDS}, with_fields))]
    first, second = (run.spectrum("none").global_.eigenvalues for run in runs)
    np.testing.assert_array_equal(first, second)
