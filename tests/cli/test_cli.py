"""The command line on good input: every kind of data, resuming, re-analysis, repair, and settings from files."""

import json
import shutil
import sys
import tomllib

import numpy as np
import pytest
import torch
import yaml
from command_line import arrays, build_parser, cli, contents

from streamfisher import SpectralConfig, open_run
from streamfisher.cli import collect
from streamfisher.reduction import gram_settings

MODEL, DATA = "tiny_models:causal", "tiny_models:sequences"
TEXT = "for line in lines:\n    total += line\n" * 3


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a finished run of 6 sequences; copy it before changing anything."""
    run = tmp_path_factory.mktemp("cli") / "run.zarr"
    assert cli("run", MODEL, DATA, "--out", run, "--quiet", "--chunk-size", 4, "--blocks", "layer,none") == 0
    return run


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was asked for")

    for name in ("load_model", "load_with_tokenizer", "call"):
        monkeypatch.setattr(f"streamfisher.models.loading.{name}", refuse)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def text_file(folder):
    return write(folder / "text.txt", TEXT), []


def text_folder(folder):
    write(folder / "texts/b.py", TEXT[:40])
    write(folder / "texts/deep/a.md", TEXT[:25])
    write(folder / "texts/picture.bin", TEXT)
    return folder / "texts", []


def json_lines(folder):
    lines = [{"body": TEXT[:20]}, {"body": [1, 2, 3, 250]}, {"body": TEXT}]
    return write(folder / "a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n"), ["--field", "body"]


def ids_in_one_row(folder):
    np.save(folder / "ids.npy", np.arange(50, dtype=np.uint16))
    return folder / "ids.npy", []


def ids_in_rows(folder):
    np.save(folder / "ids.npy", np.arange(40, dtype=np.int16).reshape(5, 8))
    return folder / "ids.npy", []


def ids_and_labels(folder):
    ids = np.arange(40).reshape(5, 8)
    np.savez(folder / "ids.npz", input_ids=ids, labels=np.where(ids % 3 == 0, -100, ids))
    return folder / "ids.npz", []


def callable_that_returns(folder):
    return "tiny_models:sequences", []


def callable_that_yields(folder):
    return "tiny_models:yielded_sequences", []


KINDS = {
    text_file: [16] * 6 + [15],  # 111 bytes
    text_folder: [16, 16, 8, 16, 9],
    json_lines: [16, 4, 16],
    ids_in_one_row: [16, 16, 16, 2],
    ids_in_rows: [8] * 5,
    ids_and_labels: [8] * 5,
    callable_that_returns: [5] * 6,
    callable_that_yields: [5] * 6,
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_run_takes(kind, tmp_path, capsys):
    data, options = kind(tmp_path)
    arguments = ("run", MODEL, data, "--out", "run.zarr", "--max-length", 16, "--quiet", "--blocks", "none", *options)
    assert cli(*arguments) == 0
    run, lengths = open_run(tmp_path / "run.zarr"), KINDS[kind]
    assert run.n_samples == len(lengths)
    if kind is not ids_and_labels:
        assert run.store.samples.per_sample("n_targets").tolist() == [length - 1 for length in lengths]
    assert f"N = {len(lengths)} sequences" in capsys.readouterr().out
    assert np.isfinite(run.spectrum("none").global_.trace)
    assert (tmp_path / "run.zarr/spectrum.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_text_folder_is_read_in_the_order_of_its_paths(tmp_path):
    from streamfisher import load_samples

    folder, _ = text_folder(tmp_path)
    samples = load_samples(str(folder), max_length=100)
    assert [bytes(sample["input_ids"].tolist()).decode() for sample in samples] == [TEXT[:40], TEXT[:25]]


def test_run_takes_arrays_for_a_model_of_vectors(tmp_path, capsys):
    import tiny_models

    data = tiny_models.vectors()
    np.savez("vectors.npz", **{key: value.numpy() for key, value in data.items()})
    assert cli("run", "tiny_models:regression", "vectors.npz", "--out", "run.zarr", "--quiet") == 0
    assert "N = 8 examples" in capsys.readouterr().out
    assert open_run("run.zarr").manifest.loss["loss"] == "regression"


def test_model_and_data_in_the_current_folder_are_found(tmp_path):
    program = "import torch\ndef model(): return torch.nn.Linear(2, 1)\n"
    program += (
        "def data():\n    for n in range(4): yield {'x': torch.arange(2.) + n, 'labels': torch.full((1,), 0.5)}\n"
    )
    write(tmp_path / "my_own_program.py", program)
    path = list(sys.path)
    assert cli("run", "my_own_program:model", "my_own_program:data", "--out", "run.zarr", "--quiet") == 0
    assert sys.path == path
    assert open_run("run.zarr").n_samples == 4


def test_run_takes_a_hugging_face_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16, vocab_size=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    np.save("ids.npy", np.random.default_rng(0).integers(0, 32, (5, 7)))
    capsys.readouterr()
    options = ("--blocks", "module", "--center", "both", "--json", "--quiet")
    assert cli("run", "gpt2", "ids.npy", "--out", "run.zarr", *options) == 0
    found = json.loads(capsys.readouterr().out)["spectra"]
    assert [spectrum["metadata"]["centered"] for spectrum in found] == [False, True]
    assert {"attention", "mlp", "embedding", "normalization"} <= set(found[0]["per_block"])
    assert open_run("run.zarr").manifest.model["class"].endswith("GPT2LMHeadModel")


def test_text_needs_no_tokenizer_with_bytes(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=16, vocab_size=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    text, _ = text_file(tmp_path)
    arguments = ("collect", "gpt2", text, "--out", "run.zarr", "--max-length", 16, "--quiet")
    assert cli(*arguments, "--tokenizer", "bytes") == 0


def test_the_same_line_again_changes_nothing(copied):
    before, times = contents(copied), {path: path.stat().st_mtime_ns for path in copied.rglob("gradients/*/c/*/*")}
    assert cli("run", MODEL, DATA, "--out", copied, "--quiet", "--chunk-size", 4, "--blocks", "layer,none") == 0
    after = contents(copied)
    assert after["spectrum.json"] == before["spectrum.json"]
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"spectrum.png"}
    assert times and times == {path: path.stat().st_mtime_ns for path in times}


def test_collect_gram_and_spectrum_are_run_a_stage_at_a_time(finished, tmp_path, capsys):
    assert cli("collect", MODEL, DATA, "--out", "staged.zarr", "--quiet", "--chunk-size", 4) == 0
    assert "complete, 6 of 6" in capsys.readouterr().out
    assert not list(tmp_path.glob("staged.zarr/done/gram-*"))
    assert cli("gram", "staged.zarr", "--quiet") == 0
    assert "5 Gram matrices built, 0 were there" in capsys.readouterr().out
    assert cli("spectrum", "staged.zarr", "--blocks", "layer,none", "--out", "spectrum.json", "--quiet") == 0
    assert (tmp_path / "spectrum.json").read_bytes() == (finished / "spectrum.json").read_bytes()
    assert arrays(tmp_path / "staged.zarr") == arrays(finished)


def test_spectrum_needs_no_model_and_writes_nothing(copied, no_model, capsys):
    before = contents(copied)
    assert cli("spectrum", copied, "--blocks", "module", "--center", "--quiet") == 0
    table = capsys.readouterr().out
    assert "Gradient covariance, blocks: module, N = 6 sequences" in table
    assert "embedding" in table and "normalization" in table
    assert contents(copied) == before


def test_spectrum_of_some_samples_is_that_of_a_run_of_them(finished, no_model, capsys):
    assert cli("spectrum", finished, "--samples", "0:4", "--blocks", "none", "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["n_samples"] == found["global"]["n_samples"] == 4
    K = sum(open_run(finished).gram(name) for name in open_run(finished).parameters)[:4, :4]
    np.testing.assert_allclose(found["global"]["eigenvalues"], np.linalg.eigvalsh(K / 4)[::-1], rtol=1e-9)


@pytest.mark.parametrize(("text", "count"), [("4", 4), (":3", 3), ("2:", 4), ("::2", 3), ("-2:", 2), ("0:99", 6)])
def test_samples_are_a_slice(text, count, finished, capsys):
    assert cli("spectrum", finished, f"--samples={text}", "--blocks", "none", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["n_samples"] == count


def test_json_holds_nothing_but_json_on_stdout(finished, copied, capsys):
    arguments = ("run", MODEL, DATA, "--out", copied, "--quiet", "--chunk-size", 4)
    assert cli(*arguments, "--json", "--blocks", "layer,none", "--center", "both") == 0
    output = capsys.readouterr()
    assert len(json.loads(output.out)["spectra"]) == 4
    assert "spectrum.json" in output.err


def test_top_k_lists_the_largest_and_keeps_the_trace(finished, capsys):
    found = []
    for options in ([], ["--top-k", 2]):
        assert cli("spectrum", finished, "--blocks", "none", "--json", "--quiet", *options) == 0
        found.append(json.loads(capsys.readouterr().out)["global"])
    full, top = found
    assert top["eigenvalues"] == full["eigenvalues"][:2]
    assert top["trace"] == full["trace"] and top["truncated"] and not full["truncated"]


def test_info_says_what_a_run_holds(finished, no_model, capsys):
    assert cli("info", finished) == 0
    text = capsys.readouterr().out
    for part in ("complete, 6 of 6 sequences", "TinyCausal", "2,312 parameters in 5", "5 of 5", DATA, "causal: sum"):
        assert part in text
    assert "{" not in text
    assert cli("info", finished, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["complete"] and facts["n_samples"] == facts["samples_done"] == 6
    assert facts["total_params"] == 2312 and facts["config"]["chunk_size"] == 4


def test_gram_rebuild_gives_the_same_bits(copied, no_model, capsys):
    before = arrays(copied)
    for path in (copied / "gram").rglob("c/*/*"):
        path.write_bytes(b"damaged")
    assert cli("gram", copied, "--quiet") == 0
    assert "0 Gram matrices built, 5 were there" in capsys.readouterr().out
    assert cli("spectrum", copied, "--quiet") == 4
    assert "gram --rebuild" in capsys.readouterr().err
    assert cli("gram", copied, "--rebuild", "--quiet") == 0
    assert "5 Gram matrices built" in capsys.readouterr().out
    assert arrays(copied) == before


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG\r\n\x1a\n"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_report_draws_a_picture(suffix, start, finished, tmp_path, no_model, capsys):
    picture = tmp_path / f"picture.{suffix}"
    assert cli("report", finished, "--out", picture, "--blocks", "layer,none", "--center", "both", "--quiet") == 0
    assert str(picture) in capsys.readouterr().out
    content = picture.read_bytes()
    assert content.startswith(start) and len(content) > 5000
    if suffix == "svg":
        assert b"</svg>" in content


def test_report_without_a_name_draws_into_the_run(copied):
    (copied / "spectrum.png").unlink()
    assert cli("report", copied, "--quiet") == 0
    assert (copied / "spectrum.png").stat().st_size > 5000


def test_verify_finds_nothing_in_an_intact_run(copied, no_model, capsys):
    before = contents(copied)
    assert cli("verify", copied, "--quiet") == 0
    assert "intact" in capsys.readouterr().out
    assert cli("verify", copied, "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert contents(copied) == before


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def delete(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def empty(path):
    path.write_bytes(b"")


def arrays_of(files):
    return {
        name: data for name, data in files.items() if name.split("/")[0] in ("gradients", "packed", "samples", "gram")
    }


DAMAGE = {
    "row": ("gradients/head.weight/c/1/0", ["rows of head.weight", "samples 4 to 5"]),
    "loss": ("samples/loss/c/0", ["loss", "samples 0 to 3"]),
    "valid": ("samples/valid/c/1", ["valid", "samples 4 to 5"]),
    "norm": ("samples/squared_norm/c/1/0", ["squared_norm", "samples 4 to 5"]),
    "marker": ("done/rows-000001.json", ["marker", "samples 4 to 5"]),
    "Gram": ("gram/head.weight/c/0/0", ["gram of head.weight"]),
    "Gram's marker": ("done/gram-head.weight.json", ["gram of head.weight"]),
}


@pytest.mark.parametrize(
    ("what", "harm"),
    [
        (what, harm)
        for what in DAMAGE
        for harm in (flip, delete, cut, empty)
        if "marker" not in what or harm in (cut, empty)
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_damage_is_found_named_and_repaired_by_the_next_run(what, harm, copied, capsys):
    name, says = DAMAGE[what]
    before = contents(copied)
    again = ("run", MODEL, DATA, "--out", copied, "--quiet", "--chunk-size", 4, "--blocks", "layer,none")
    harm(copied / name)
    harmed = contents(copied)
    assert cli("verify", copied, "--quiet") == 4
    output = capsys.readouterr().out
    for part in (*says, "Nothing was changed.", "--repair"):
        assert part in output
    assert contents(copied) == harmed
    assert cli("verify", copied, "--repair", "--quiet") == 4
    assert "Repaired" in capsys.readouterr().out
    whole_grams = {name for name in harmed if name.startswith("done/gram-")}
    kept = {name for name in whole_grams if "gram" not in what.lower() or "head.weight" not in name}
    assert kept <= contents(copied).keys()  # sound Grams stay
    assert cli(*again) == 0
    assert arrays(copied) == arrays_of(before)
    assert contents(copied)["spectrum.json"] == before["spectrum.json"]
    assert cli("verify", copied, "--quiet") == 0


@pytest.mark.parametrize("name", ["rows-000001", "gram-head.weight"])
def test_what_has_no_marker_is_done_again(name, copied, capsys):
    before = contents(copied)
    delete(copied / "done" / f"{name}.json")
    assert cli("verify", copied, "--quiet") == (7 if "rows" in name else 0)
    assert ("4 of 6 samples are finished." in capsys.readouterr().out) == ("rows" in name)
    assert cli("run", MODEL, DATA, "--out", copied, "--quiet", "--chunk-size", 4, "--blocks", "layer,none") == 0
    assert arrays(copied) == arrays_of(before)
    assert contents(copied)["spectrum.json"] == before["spectrum.json"]


def test_verify_changes_nothing_unless_asked_to_repair(copied):
    flip(copied / "gradients/head.weight/c/1/0")
    before = contents(copied)
    for options in ((), ("--dry-run",)):
        assert cli("verify", copied, *options, "--quiet") == 4
        assert contents(copied) == before
    assert cli("verify", copied, "--dry-run", "--repair") == 2


def test_verify_json_names_parameter_and_samples(copied, capsys):
    flip(copied / "gradients/norm.bias/c/0/0")
    assert cli("verify", copied, "--json", "--quiet") == 4
    (problem,) = json.loads(capsys.readouterr().out)
    assert problem["parameter"] == "norm.bias"
    assert (problem["first_sample"], problem["last_sample"]) == (0, 3)


@pytest.mark.parametrize("name", ["samples/loss", "gradients/head.weight", "samples/squared_norm", "samples/valid"])
def test_damaged_values_are_no_traceback(name, copied, capsys):
    for path in (copied / name).glob("c/**/*"):
        if path.is_file():
            flip(path)
    for marker in (copied / "done").glob("gram-*"):
        marker.unlink()
    code = cli("spectrum", copied, "--quiet")
    message = capsys.readouterr().err
    assert (code, "Traceback" in message) == (4, False) or (name == "samples/loss" and code == 0)


# A value of every option of a config file that is not the default and can be used on the tiny model.
EVERY_OPTION = {
    "model": MODEL,
    "data": DATA,
    "out": "run.zarr",
    "samples": 5,
    "field": "body",
    "tokenizer": "bytes",
    "trust_remote_code": True,
    "top_k": 3,
    "blocks": "module",
    "center": "yes",
    "sample_unit": "sequence",
    "tokens_per_sequence": None,
    "classes_per_sample": None,
    "labels": "data",
    "loss": "causal",
    "include": ["*.weight", "*.bias"],
    "exclude": ["norm.*"],
    "max_length": 4,
    "max_params_per_block": 1000,
    "seed": 7,
    "chunk_size": 2,
    "batch_tokens": 8,
    "guard_every": 3,
    "on_nonfinite": "skip",
    "dtype": "float64",
    "compute_dtype": "float64",
    "store_dtype": "float64",
    "bitround": None,
    "gram_dtype": "float64",
    "gram_device": "cpu",
    "dtype_eigensolve": "float64",
    "eps": 1e-9,
    "top_k_eigenvalues": 5,
    "solver": "dense",
    "regularization": 1e-7,
    "eigensolve_device": "cpu",
    "storage_mode": "streaming",
    "store_path": "elsewhere",
    "store_centered": True,
    "representation": "dense",
    "project": 500,
    "stream": "none",
    "fsync": True,
    "direct_io": "always",
    "hold": "disk",
    "keep_gradients": ["norm.*"],
    "store_text": None,
    "gram_per": "layer",
    "codec": "zstd",
    "device": "cpu",
    "workers": 1,
    "rank_timeout": 60,
    "memory_budget": "1GB",
    "disk_budget": "2GB",
    "device_memory_budget": "3GB",
    "deterministic": True,
}
ALIASES = {
    "blocks": "block_structure",
    "center": "center_gradients",
    "dtype": "dtype_model",
    "compute_dtype": "dtype_compute",
    "store_dtype": "dtype_store",
    "gram_dtype": "dtype_gram",
    "workers": "n_workers",
    "deterministic": "use_deterministic",
}


def toml(values):
    lines = [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines)


def test_every_option_has_a_value_here():
    import dataclasses

    names = {ALIASES.get(name, name) for name in EVERY_OPTION}
    assert {item.name for item in dataclasses.fields(SpectralConfig)} <= names


@pytest.mark.parametrize("kind", ["toml", "yaml", "json"])
def test_config_file_sets_every_option_and_is_echoed(kind, tmp_path, monkeypatch):
    text = {"toml": toml, "yaml": yaml.safe_dump, "json": json.dumps}[kind](EVERY_OPTION)
    if kind == "toml":
        assert "chunk-size" in tomllib.loads(text)
    write(tmp_path / f"settings.{kind}", text)
    assert cli("run", "--config", f"settings.{kind}", "--quiet") == 0
    manifest = json.loads((tmp_path / "run.zarr/manifest.json").read_text())
    expected = {ALIASES.get(name, name): value for name, value in EVERY_OPTION.items()}
    expected |= {"center_gradients": True, "memory_budget": 10**9, "disk_budget": 2 * 10**9}
    expected |= {"device_memory_budget": 3 * 10**9}
    echoed = manifest["config"] | manifest["data"]["description"]
    for name, value in expected.items():
        assert name == "out" or echoed[name] == value, name
    spectrum = json.loads((tmp_path / "run.zarr/spectrum.json").read_text())
    assert spectrum["metadata"]["n_samples"] == 5 and spectrum["metadata"]["centered"]
    assert spectrum["metadata"]["block_structure"] == "module"


def test_command_line_wins_over_the_config_file(tmp_path):
    write(tmp_path / "a.yaml", "chunk_size: 2\nseed: 7\nsamples: 4\nblocks: module\neps: 1e-6\n")
    options = ("--chunk-size", 3, "--blocks", "none,layer", "--samples", 5)
    assert cli("run", MODEL, DATA, "--out", "run.zarr", "--config", "a.yaml", "--quiet", *options) == 0
    run = open_run("run.zarr")
    assert (run.config.chunk_size, run.config.seed, run.n_samples) == (3, 7, 5)
    assert run.config.eps == 1e-6  # YAML reads 1e-6 as text
    assert run.manifest.data["description"]["blocks"] == ["none", "layer"]


def test_deterministic_run_puts_torch_back(tmp_path):
    assert cli("collect", MODEL, DATA, "--out", "run.zarr", "--quiet", "--deterministic") == 0
    assert not torch.are_deterministic_algorithms_enabled()


OPTIONS = {
    "run": [
        *("--samples", "--max-length", "--batch-tokens", "--blocks", "--center", "--dtype", "--seed", "--device"),
        *("--deterministic", "--config", "--out", "--field", "--tokenizer", "--on-nonfinite", "--store-centered"),
        *("--include", "--exclude", "--store-dtype", "--bitround", "--codec", "--memory-budget", "--workers", "--eps"),
        *("--disk-budget", "--representation", "--keep-gradients", "--gram-per", "--stream", "--project", "--fsync"),
    ],
    "replay": ["--out", "--trust-remote-code", "RUN.zarr"],
    "collect": ["--samples", "--max-length", "--out", "--config", "--store-centered"],
    "gram": ["--rebuild", "--gram-dtype", "--workers", "--memory-budget", "RUN.zarr"],
    "spectrum": ["--blocks", "--center", "--samples", "--top-k", "--out", "RUN.zarr"],
    "report": ["--blocks", "--center", "--out", "RUN.zarr"],
    "eigenvectors": ["--block", "--top", "--out", "RUN.zarr"],
    "density": ["--block", "--vectors", "--steps", "--sigma", "--scale", "--out", "--solver", "RUN.zarr"],
    "compare": ["--top", "--out", "RUN.zarr"],
    "export": ["--to", "--out", "RUN.zarr"],
    "samples": ["--block", "--top", "--carriers", "--damping", "--threshold", "--texts", "--out", "RUN.zarr"],
    "influence": ["--queries", "--damping", "--relative", "--pseudo-inverse", "--score", "--top", "--out", "RUN.zarr"],
    "directions": ["--block", "--top", "--update", "--queries", "--bootstrap", "--out", "RUN.zarr"],
    "info": ["--watch", "RUN.zarr"],
    "verify": ["--repair", "--deep", "RUN.zarr"],
    "plan": ["--samples", "--max-length", "--flops", "--disk", "--devices", "--memory-budget", "--disk-budget"],
    "demo": ["--out", "--samples"],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_lists_the_options(command, capsys):
    assert cli(command, "--help") == 0
    text = capsys.readouterr().out
    for option in [*OPTIONS[command], "--json", "--quiet", "--debug", "exit codes"]:
        assert option in text


def test_grams_rebuilt_in_another_precision_agree(copied, no_model, capsys):
    assert cli("gram", copied, "--rebuild", "--gram-dtype", "float64", "--workers", "2", "--json", "--quiet") == 0
    differences = json.loads(capsys.readouterr().out)
    assert set(differences) == set(open_run(copied).parameters)
    assert all(difference < 1e-6 for difference in differences.values())


def test_every_command_is_in_the_help(capsys):
    assert cli("--help") == 0
    text = capsys.readouterr().out
    commands = next(action.choices for action in build_parser()._actions if action.choices)
    assert set(commands) == set(OPTIONS)
    assert all(command in text for command in commands)


def test_no_command_is_refused(capsys):
    assert cli() == 2
    assert "COMMAND" in capsys.readouterr().err


def test_version_is_printed(capsys):
    from streamfisher import __version__

    assert cli("--version") == 0
    assert __version__ in capsys.readouterr().out


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(collect, "_collected", interrupted)
    assert cli("run", MODEL, DATA, "--out", "run.zarr") == 130
    assert "goes on where it stopped" in capsys.readouterr().err


def test_demo_runs_on_a_few_samples(tmp_path, capsys):
    assert cli("demo", "--samples", 3, "--out", "demo.zarr", "--quiet") == 0
    output = capsys.readouterr().out
    assert output.count("N = 3 sequences") == 6
    assert (tmp_path / "demo.zarr/spectrum.png").is_file()


def test_looking_in_another_precision_changes_no_data(copied, no_model, capsys):
    before = contents(copied)
    assert cli("spectrum", copied, "--gram-dtype", "float64", "--blocks", "none", "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["dtype_gram"] == "float64"
    assert cli("density", copied, "--block", "global", "--blocks", "none", "--gram-dtype", "float64", "--quiet") == 0
    assert cli("compare", copied, copied, "--gram-dtype", "float64", "--quiet") == 0
    assert cli("export", copied, "--to", "csv", "--gram-dtype", "float64", "--quiet") == 0
    assert contents(copied) == before
    wanted = ("--block", "global", "--blocks", "none", "--top", "1", "--gram-dtype", "float64", "--quiet")
    assert cli("eigenvectors", copied, *wanted) == 2
    assert "`streamfisher gram` with the same options" in capsys.readouterr().err
    assert contents(copied) == before

    assert cli("gram", copied, "--gram-dtype", "float64", "--quiet") == 0
    run = open_run(copied)
    assert run.store.grams.done(gram_settings(run.config.replace(dtype_gram="float64"))) == set(run.parameters)
    assert cli("eigenvectors", copied, *wanted) == 0
    stored = contents(copied)
    capsys.readouterr()
    assert cli("spectrum", copied, "--gram-dtype", "float64", "--blocks", "none", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out) == found  # from stored Grams as from those in memory
    assert cli("spectrum", copied, "--blocks", "none", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["dtype_gram"] == "float32"
    assert contents(copied) == stored
