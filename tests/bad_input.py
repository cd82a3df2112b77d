"""Bad input, as data: what the tests give, what must be said, and the page that lists it.

    PYTHONPATH=tests python tests/bad_input.py

writes `docs/bad-input.md`. Every message there is what the command line printed, or what Python raised.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tiny_models
import torch
from command_line import cli

import streamfisher as sf

MODEL, DATA = "tiny_models:causal", "tiny_models:sequences"
_SHOWN = 220  # characters of a message, at most
PAGE = Path(__file__).parents[1] / "docs" / "bad-input.md"


def write(name, content=""):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return name


def write_arrays(name, **arrays):
    np.savez(name, **arrays)
    return name


def save(name, array):
    np.save(name, array)
    return name


# Name, what DATA (or a function that makes it) is, and what the message must say
BAD_DATA = {
    "empty file": (lambda: write("empty.txt"), ["empty.txt", "is empty", "2 tokens"]),
    "file of one byte": (lambda: write("one.txt", "a"), ["one.txt", "is empty"]),
    "one sample": (lambda: write("short.txt", "abc"), ["1 sample", "at least 2"]),
    "missing path": (lambda: "no/such.txt", ["no/such.txt", "no such file", "module:callable"]),
    "folder without text": (lambda: write("bare/picture.bin").split("/")[0], ["bare", "no text files", ".txt"]),
    "empty folder of texts": (lambda: write("texts/a.txt").split("/")[0], ["texts", "is empty"]),
    "jsonl, not JSON": (lambda: write("a.jsonl", '{"text": "abc"}\n{"text'), ["a.jsonl", "line 2", "not JSON"]),
    "jsonl, no field": (lambda: write("a.jsonl", '{"body": "abc"}\n'), ["line 1", "'text'", "body", "--field"]),
    "jsonl, not an object": (lambda: write("a.jsonl", "[1, 2]\n"), ["line 1", "'text'", "--field"]),
    "jsonl, a number": (lambda: write("a.jsonl", '{"text": 5}\n'), ["line 1", "neither text nor token ids"]),
    "jsonl, fractions": (lambda: write("a.jsonl", '{"text": [1.5, 2.5]}\n'), ["line 1", "neither text nor token ids"]),
    "jsonl, null": (lambda: write("a.jsonl", '{"text": null}\n'), ["line 1", "neither text nor token ids"]),
    "jsonl, brackets without end": (
        lambda: write("a.jsonl", '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}\n"),
        ["line 1", "not JSON", "too deeply"],
    ),
    "jsonl, an id beyond 64 bits": (lambda: write("a.jsonl", f'{{"text": [1, {2**63}]}}\n'), ["line 1", "64 bits"]),
    "empty jsonl": (lambda: write("a.jsonl", "\n\n"), ["a.jsonl", "is empty"]),
    "npz of strings": (lambda: write_arrays("s.npz", words=np.array(["a", "b"])), ["s.npz", "'words'", "numbers"]),
    "npz of objects": (
        lambda: write_arrays("o.npz", things=np.array([{}, None], dtype=object)),
        ["o.npz", "cannot be read", "numpy"],
    ),
    "npz that is none": (lambda: write("fake.npz", "not a zip"), ["fake.npz", "cannot be read"]),
    "npz that is torn": (lambda: write("torn.npz", "PK\x03\x04 torn"), ["torn.npz", "cannot be read"]),
    "empty npy": (lambda: save("e.npy", np.zeros((0, 4), dtype=np.int64)), ["e.npy", "holds no samples"]),
    "npz of unequal lengths": (
        lambda: write_arrays("u.npz", input_ids=np.ones((4, 3), np.int64), labels=np.ones((3, 3), np.int64)),
        ["first axis", "4", "3"],
    ),
    "unknown data module": (lambda: "no_such_module:data", ["no_such_module", "folder you are in"]),
    "unknown data callable": (lambda: "tiny_models:no_such_data", ["tiny_models", "no callable named no_such_data"]),
    "callable that gives nothing": (lambda: "tiny_models:nothing", ["tiny_models:nothing", "NoneType", "dict"]),
    "callable that gives bare tensors": (lambda: "tiny_models:bare_tensors", ["sample 0", "Tensor", "dict of tensors"]),
    "sequence of one token": (
        lambda: "tiny_models:one_token_in_sample_2",
        ["sample 2", "sequence of 1 token", "needs 2"],
    ),
    "all labels masked": (lambda: "tiny_models:masked_in_sample_3", ["sample 3", "masked", "Leave it out"]),
    "token ids beyond the vocabulary in a late sample": (
        lambda: save("late.npy", np.vstack([np.full((4, 5), 7), np.full((2, 5), 999)])),
        ["samples 4 to 5", "index out of range", "vocabulary"],
    ),
    "label beyond the classes": (
        lambda: "tiny_models:label_beyond_the_classes",
        ["sample 4", "Label 300", "256 classes"],
    ),
    "token ids beyond the vocabulary": (
        lambda: save("big.npy", np.full((4, 5), 999)),
        ["sample 0", "index out of range", "vocabulary"],
    ),
}


BAD_MODELS = {
    "missing path": (lambda: "./no/such/model", ["./no/such/model", "no such folder", "module:callable"]),
    "folder without config.json": (lambda: write("folder/weights.bin").split("/")[0], ["folder", "config.json"]),
    "a file": (lambda: write("model.pt"), ["model.pt", "is a file", "folder"]),
    "unknown module": (lambda: "no_such_module:model", ["no_such_module", "folder you are in"]),
    "unknown callable": (lambda: "tiny_models:no_such_model", ["no callable named no_such_model"]),
    "not of the form": (lambda: "tiny models:causal", ["tiny models:causal", "package.module:callable"]),
    "returns no module": (lambda: "tiny_models:no_module", ["tiny_models:no_module", "str", "torch.nn.Module"]),
    "needs an argument": (lambda: "tiny_models:needs_an_argument", ["needs_an_argument", "without arguments"]),
    "nothing to train": (lambda: "tiny_models:frozen", ["requires_grad"]),
}


BAD_OPTIONS = {
    "no samples": (["--samples", 0], ["--samples 0", "at least 2"]),
    "one sample": (["--samples", 1], ["--samples 1", "at least 2"]),
    "negative samples": (["--samples", -3], ["--samples -3", "at least 2"]),
    "more samples than there are": (["--samples", 99], ["99", "holds 6"]),
    "samples that are no number": (["--samples", "many"], ["--samples", "many"]),
    "unknown blocks": (["--blocks", "layers"], ["'layers'", "layer, module, parameter, none"]),
    "one of two blocks unknown": (["--blocks", "layer,nothing"], ["'nothing'", "layer, module"]),
    "unknown centering": (["--center", "maybe"], ["--center 'maybe'", "no, yes or both"]),
    "unknown dtype": (["--dtype", "float8"], ["'float8'", "float64, float32, bfloat16, float16"]),
    "unknown store dtype": (["--store-dtype", "int8"], ["dtype_store", "'int8'", "bfloat16"]),
    "unknown gram dtype": (["--gram-dtype", "bfloat16"], ["dtype_gram", "bfloat16", "float32, float64"]),
    "unknown codec": (["--codec", "gzip"], ["codec", "'gzip'", "blosc-lz4, zstd, raw"]),
    "unknown loss": (["--loss", "mse"], ["loss", "'mse'", "causal, token, classification, regression"]),
    "unknown device": (["--device", "abacus"], ["abacus", "--device cpu"]),
    "include matches nothing": (["--include", "nose.*"], ["nose.*"]),
    "exclude leaves nothing": (["--exclude", "*"], ["exclude patterns leave none of 5"]),
    "bitround beyond float32": (["--bitround", 30], ["bitround=30", "23"]),
    "bitround of bf16 rows": (["--bitround", 7, "--store-dtype", "bfloat16"], ["bitround=7", "float32 rows"]),
    "chunks of more than 2 GiB": (["--chunk-size", 2**40], ["chunk_size=1099511627776", "at most"]),
    "no chunk": (["--chunk-size", 0], ["chunk_size=0", "at least 1"]),
    "no tokens": (["--max-length", 0], ["max_length=0", "at least 1"]),
    "sequences of one token": (["--max-length", 1], ["sample 0", "sequence of 1 token", "needs 2"]),
    "eps of one": (["--eps", 1], ["eps=1", "[0, 1)"]),
    "no eigenvalues": (["--top-k", 0], ["--top-k 0", "at least 1"]),
    "no workers": (["--workers", 0], ["n_workers=0", "at least 1"]),
    "memory that is no size": (["--memory-budget", "lots"], ["'lots'", "2GB"]),
    "unknown nonfinite": (["--on-nonfinite", "ignore"], ["on_nonfinite", "'ignore'", "raise, skip"]),
    "unknown unit": (["--sample-unit", "word"], ["sample_unit", "'word'", "sequence, token"]),
    "missing config": (["--config", "no.toml"], ["no.toml", "no such file"]),
}


BAD_CONFIGS = {
    "unknown key": ("a.toml", "chunk_sise = 4", ["'chunk_sise'", "Did you mean chunk_size?"]),
    "unknown key with a dash": ("a.yaml", "batch-token: 4", ["'batch_token'", "batch_tokens"]),
    "key like none": ("a.toml", "qqqq = 4", ["'qqqq'", "Known:", "chunk_size"]),
    "not TOML": ("a.toml", "= 4 =", ["a.toml", "cannot be parsed"]),
    "not YAML": ("a.yaml", "{a: [", ["a.yaml", "cannot be parsed"]),
    "not JSON": ("a.json", "{", ["a.json", "cannot be parsed"]),
    "unknown kind": ("a.ini", "a = 4", ["'.ini'", ".toml, .yaml or .json"]),
    "a list": ("a.yaml", "- 1\n- 2\n", ["a.yaml", "mapping", "list"]),
    "number of samples as text": ("a.toml", 'samples = "six"', ["samples", "'six'", "whole number"]),
    "fraction of a sample": ("a.toml", "samples = 2.5", ["samples", "2.5", "whole number"]),
    "seed as text": ("a.toml", 'seed = "x"', ["seed='x'", "whole number"]),
    "yes as text": ("a.toml", 'store_centered = "no"', ["store_centered='no'", "true or false"]),
    "remote code as text": ("a.toml", 'trust_remote_code = "no"', ["trust_remote_code='no'", "true or false"]),
    "patterns as a number": ("a.toml", "include = 3", ["include=3", "patterns"]),
    "eps as a word": ("a.yaml", "eps: small", ["eps='small'", "number"]),
    "top k as a word": ("a.yaml", "top_k: all", ["top-k", "all", "whole number"]),
    "blocks as a number": ("a.toml", "blocks = 3", ["blocks", "3", "layer, module"]),
    "a date that is none": ("a.yaml", "seed: 2001-99-99", ["a.yaml", "cannot be parsed", "month"]),
    "what holds itself": ("a.yaml", "include: &a [*a]", ["a.yaml", "values", "aliases"]),
    "a seed that torch does not take": ("a.toml", f"seed = {2**64}", ["seed", "65 bits"]),
    "no blocks": ("a.toml", "blocks = []", ["blocks", "layer, module"]),
    "centering as a list": ("a.toml", "center = [true]", ["center", "no, yes or both"]),
}


OTHERS = {
    "model with other values": (["tiny_models:causal_with_other_values", DATA], ["model", "other values"]),
    "model of other shapes": (
        ["tiny_models:causal_of_another_width", DATA],
        ["embedding.weight", "(256, 4)", "(256, 5)"],
    ),
    "model of another class": (["streamfisher.demo:load_demo_model", DATA], ["model class", "TinyCausal", "Byte"]),
    "seed": ([MODEL, DATA, "--seed", 7], ["seed", "42", "7"]),
    "batch": ([MODEL, DATA, "--batch-tokens", 9], ["batch_tokens", "4096", "9"]),
    "stored dtype": ([MODEL, DATA, "--store-dtype", "bfloat16"], ["dtype_store", "bfloat16"]),
    "parameters": ([MODEL, DATA, "--exclude", "norm.*"], ["exclude", "norm.*"]),
    "number of samples": ([MODEL, DATA, "--samples", 5], ["number of samples", "6 in the run", "5 now"]),
    "data": ([MODEL, "tiny_models:one_changed"], ["data", "samples 4 to 5", "other contents"]),
}


BAD_SLICES = {
    "a:b:c:d": ["'a:b:c:d'", "0:512"],
    "0:1:2:3": ["'0:1:2:3'", "0:512"],
    "half": ["'half'", "0:512"],
    "0:1": ["0:1", "fewer than 2", "6 samples"],
    "5:2": ["5:2", "fewer than 2"],
    "100:": ["100:", "fewer than 2"],
    "0:6:0": ["'0:6:0'", "step"],
}


# Name: code, the error it raises, and what the message must say. `run.zarr` is a finished run of 6 sequences.
PYTHON = {
    "config: unknown option": (
        "sf.SpectralConfig.from_dict({'chunk_sise': 4})",
        "ConfigError",
        ["'chunk_sise'", "chunk_size"],
    ),
    "config: a dtype that is none": (
        "sf.SpectralConfig(dtype_store='int8')",
        "ConfigError",
        ["dtype_store='int8'", "bfloat16"],
    ),
    "config: no samples in a chunk": ("sf.SpectralConfig(chunk_size=0)", "ConfigError", ["chunk_size=0", "at least 1"]),
    "config: a seed that is no number": ("sf.SpectralConfig(seed='x')", "ConfigError", ["seed='x'", "whole number"]),
    "config: tokens drawn of sequences": (
        "sf.SpectralConfig(tokens_per_sequence=2)",
        "ConfigError",
        ["tokens_per_sequence=2", "sample_unit='token'"],
    ),
    "config: a size that is none": (
        "sf.SpectralConfig(memory_budget='-3GB')",
        "ConfigError",
        ["memory_budget='-3GB'", "more than nothing"],
    ),
    "collect: one sample": (
        "sf.collect(tiny_models.causal(), tiny_models.sequences(1), 'new.zarr')",
        "DataError",
        ["1 sample", "at least 2"],
    ),
    "collect: more samples than there are": (
        "sf.collect(tiny_models.causal(), tiny_models.sequences(), 'new.zarr', n_samples=99)",
        "DataError",
        ["99", "6"],
    ),
    "collect: samples that are no dicts": (
        "sf.collect(tiny_models.causal(), tiny_models.bare_tensors(), 'new.zarr')",
        "DataError",
        ["sample 0", "Tensor", "dict of tensors"],
    ),
    "collect: a frozen model": (
        "sf.collect(tiny_models.frozen(), tiny_models.sequences(), 'new.zarr')",
        "ModelError",
        ["requires_grad"],
    ),
    "collect: a loss of the wrong shape": (
        "sf.collect(tiny_models.causal(), tiny_models.sequences(), 'new.zarr', loss=lambda m, batch: torch.ones(()))",
        "LossError",
        ["shape"],
    ),
    "collect: another model into a run": (
        "sf.collect(tiny_models.causal_of_another_width(), tiny_models.sequences(), 'run.zarr',"
        " config=sf.open_run('run.zarr').config)",
        "RunMismatchError",
        ["cannot be resumed", "(256, 4)", "(256, 5)"],
    ),
    "collect: another loss of the same name into a run": (
        "sf.collect(tiny_models.regression(), tiny_models.vectors(), 'r', loss=tiny_models.squares(1.0)),"
        " sf.collect(tiny_models.regression(), tiny_models.vectors(), 'r', loss=tiny_models.squares(2.0))",
        "RunMismatchError",
        ["loss compute something else", "sample"],
    ),
    "collect: a DataLoader that shuffles": (
        "sf.collect(tiny_models.causal(), torch.utils.data.DataLoader(tiny_models.sequences(), shuffle=True),"
        " 'new.zarr')",
        "DataError",
        ["shuffles", "shuffle=False"],
    ),
    "collect: TorchScript": (
        "sf.collect(torch.jit.trace(tiny_models.regression(), torch.ones(1, 3)), tiny_models.vectors(), 'new.zarr')",
        "ModelError",
        ["TorchScript", "scripted or traced from"],
    ),
    "collect: NaN in the data": (
        "sf.collect(tiny_models.regression(), tiny_models.vectors(nan_at=5), 'new.zarr')",
        "NonFiniteError",
        ["sample 5", "nan"],
    ),
    "collect: documents that see each other": (
        "sf.collect(tiny_models.TinyDocuments(), tiny_models.documents_under_a_mask(), 'new.zarr',"
        " config=sf.SpectralConfig(loss='causal'))",
        "DataError",
        ["sample 0", "position_ids start again", "Leave attention_mask out"],
    ),
    "collect: a table that eval() makes": (
        "sf.collect(tiny_models.TinyTable(), {'input_ids': torch.randn(4, 3), 'labels': torch.randn(4, 2)},"
        " 'new.zarr')",
        "CaptureError",
        ["table", "train mode", "--exclude"],
    ),
    "open_run: nothing there": ("sf.open_run('no.zarr')", "RunError", ["no.zarr", "does not exist"]),
    "spectrum: unknown blocks": (
        "sf.open_run('run.zarr').spectrum('layers')",
        "ConfigError",
        ["'layers'", "layer"],
    ),
    "spectrum: one sample": (
        "sf.open_run('run.zarr').spectrum(samples=[3])",
        "DataError",
        ["1", "at least 2"],
    ),
    "spectrum: a sample that is not there": (
        "sf.open_run('run.zarr').spectrum(samples=[0, 1, 99])",
        "DataError",
        ["99"],
    ),
    "spectrum: negative weights": (
        "sf.open_run('run.zarr').spectrum(weights=[-1, 1, 1, 1, 1, 1])",
        "DataError",
        ["weight", "negative"],
    ),
    "spectrum: too few weights": (
        "sf.open_run('run.zarr').spectrum(weights=[1, 1])",
        "DataError",
        ["2", "6"],
    ),
    "eigenvectors: unknown block": (
        "sf.open_run('run.zarr').eigenvectors('layer_99')",
        "ConfigError",
        ["'layer_99'", "the blocks are"],
    ),
    "eigenvectors: more than the rank": (
        "sf.open_run('run.zarr').eigenvectors('global', 99, block_structure='none')",
        "ConfigError",
        ["99 eigenvectors", "noise floor"],
    ),
    "precomputed gradients: NaN": (
        "sf.FisherSpectral().compute_fisher_spectrum(None, None,"
        " precomputed_gradients=[{'a': torch.tensor([1.0])}, {'a': torch.tensor([float('nan')])}])",
        "DataError",
        ["gradient 1", "not finite"],
    ),
    "precomputed gradients: other parameters": (
        "sf.FisherSpectral().compute_fisher_spectrum(None, None,"
        " precomputed_gradients=[{'a': torch.ones(2)}, {'b': torch.ones(2)}])",
        "DataError",
        ["gradient 1", "a, b"],
    ),
}


def attempt(code: str) -> Exception | None:
    """Return what a line of Python raises."""
    try:
        exec(code, {"sf": sf, "torch": torch, "np": np, "tiny_models": tiny_models})
    except Exception as error:
        return error
    return None


def commands() -> Iterator[tuple[str, str, Sequence[object]]]:
    """Yield heading, case and arguments of every command; files are made in the working directory."""
    out = ("--out", "new.zarr", "--quiet")
    for case, (make, _) in BAD_DATA.items():
        yield "Data", case, ("run", MODEL, make(), *out)
    for case, (make, _) in BAD_MODELS.items():
        yield "Models", case, ("run", make(), DATA, *out)
    for case, (options, _) in BAD_OPTIONS.items():
        yield "Options", case, ("run", MODEL, DATA, *out, *options)
    for case, (name, text, _) in BAD_CONFIGS.items():
        yield (
            "Files of options",
            f"{case}: `{text.strip()}`".replace("\n", " "),
            ("run", MODEL, DATA, *out, "--config", write(name, text)),
        )
    for case, (arguments, _) in OTHERS.items():
        if case != "data":  # made by its test
            yield (
                "Another run in the folder",
                case,
                ("run", *arguments, "--out", "run.zarr", "--chunk-size", 4, "--quiet"),
            )
    for text in BAD_SLICES:
        yield "Samples of a stored run", text, ("spectrum", "run.zarr", "--samples", text, "--quiet")


def page(finished: Path, folder: Path) -> str:
    """Return the page: every case is run in `folder`, beside a copy of the finished run as `run.zarr`."""
    lines = [
        "# What is refused, and in which words",
        "",
        "Written by `python tests/bad_input.py` from the cases that the tests run; every message is what was printed",
        "or raised. The command line prints `streamfisher: error:` before it and exits with the code given; `--debug`",
        "shows the traceback. Nothing that was there is changed.",
    ]
    count, before = 0, ""
    with contextlib.chdir(folder):
        shutil.copytree(finished, "run.zarr", dirs_exist_ok=True)
        for heading, case, arguments in commands():
            if heading != before:
                lines += ["", f"## {heading}", "", "| case | code | message |", "|---|---|---|"]
                before = heading
            printed = io.StringIO()
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
                code = cli(*arguments)
            shutil.rmtree("new.zarr", ignore_errors=True)
            lines.append(f"| {_cell(case)} | {code} | {_cell(_message(printed.getvalue()))} |")
            count += 1
        lines += ["", "## From Python", "", "| case | call | raises | message |", "|---|---|---|---|"]
        for case, (code, _, _) in PYTHON.items():
            error = attempt(code)
            kind = type(error).__name__
            lines.append(f"| {_cell(case)} | `{_cell(code)}` | `{kind}` | {_cell(str(error))} |")
            shutil.rmtree("new.zarr", ignore_errors=True)
            count += 1
    lines.insert(
        5,
        f"{count} cases. More, which need a full disk, a lock or a missing package, are in "
        "`tests/cli/test_bad_input.py`.",
    )
    return "\n".join(lines).replace(str(folder), "FOLDER") + "\n"


def _message(printed: str) -> str:
    found = printed[printed.rfind("error: ") + len("error: ") :] if "error: " in printed else printed
    return found.strip()


def _cell(text: str) -> str:
    text = " ".join(re.sub(r"\b[0-9a-f]{12}\b", "...", text).split())
    if len(text) > _SHOWN:
        text = text[:_SHOWN].rsplit(" ", 1)[0] + " ..."
    return text.replace("|", "\\|")


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        finished, place = Path(folder) / "finished.zarr", Path(folder) / "place"
        place.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli("run", MODEL, DATA, "--out", finished, "--quiet", "--chunk-size", 4) == 0
        PAGE.write_text(page(finished, place))
    print(PAGE)


if __name__ == "__main__":
    main()
