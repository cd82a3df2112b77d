"""What someone else made can be refused; it can neither run code, nor reach outside the run, nor fill the memory."""

import ast
import json
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import cli
from tiny_runs import make_run

import streamfisher
from streamfisher import open_run, verify
from streamfisher.cli.config_file import read_config_file
from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError, CorruptRunError, StreamfisherError
from streamfisher.runtime import read_json, write_json
from streamfisher.store import RunStore, open_eigenvectors

SOURCES = sorted(Path(streamfisher.__file__).parent.rglob("*.py"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("hostile") / "run.zarr", store_centered=True)
    run.eigenvectors("global", 2, block_structure="none")
    return run.path


@pytest.fixture
def run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_that_is_stored_can_run_code(path):
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for name, words in calls(tree):
        assert name not in ("eval", "exec", "yaml.load", "os.system", "pickle.loads"), name
        if name == "np.load":
            assert words.get("allow_pickle") == "False"
        if name == "torch.load":
            assert words.get("weights_only") == "True"
        if name.startswith("subprocess."):
            assert words.get("shell", "False") == "False"


def test_yaml_cannot_make_objects(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match=r"a\.yaml cannot be parsed"):
        read_config_file(tmp_path / "a.yaml")


def test_remote_code_is_off_unless_asked_for():
    from streamfisher.cli.options import RunOptions

    assert RunOptions().trust_remote_code is False


@pytest.mark.parametrize(
    ("name", "text"),
    [("deep.json", "[" * 100_000), ("deep.json", '{"a":' * 100_000), ("deep.yaml", "[" * 20_000)],
)
def test_deep_config_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{name} cannot be parsed"):
        read_config_file(tmp_path / name)


HUGE = {
    "samples": lambda m: m["data"].update(n_samples=10**15),
    "samples, with room in a chunk": lambda m: (
        m["data"].update(n_samples=3 * 2**50),
        m["layout"].update(chunk_rows=2**50),
    ),
    "shape": lambda m: m["parameters"][0].update(shape=[2**40, 2**40]),
    "chunk": lambda m: m["parameters"][0].update(chunk_columns=2**40),
    "negative shape": lambda m: m["parameters"][0].update(shape=[-5, 3]),
    "shape of NaN": lambda m: m["parameters"][0].update(shape=["NaN"]),
    "no samples": lambda m: m["data"].update(n_samples=0),
    "samples as text": lambda m: m["data"].update(n_samples="24"),
    "true samples": lambda m: m["data"].update(n_samples=True),
    "the same name twice": lambda m: m["parameters"].append(m["parameters"][0]),
    "name that is none": lambda m: m["parameters"][0].update(name=["a"]),
    "a dtype of objects": lambda m: m["layout"].update(dtype_store="object"),
    "no layout": lambda m: m.update(layout=[]),
}


@pytest.mark.parametrize("case", HUGE)
def test_a_manifest_of_impossible_sizes_is_refused_without_taking_memory(case, run):
    manifest = read_json(run / "manifest.json")
    HUGE[case](manifest)
    write_json(run / "manifest.json", manifest)  # sealed anew: whoever wrote it can do that
    tracemalloc.start()
    with pytest.raises(CorruptRunError, match=r"manifest\.json"):
        open_run(run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize(
    ("what", "where"),
    [
        *(("shape", f"{kind}/first.weight") for kind in ("gradients", "gram", "mean")),
        *(("chunks", f"{kind}/first.weight") for kind in ("gradients", "gram", "mean")),
        ("chunks", "samples/loss"),
    ],
)
def test_an_array_of_huge_shape_or_chunks_is_refused_without_taking_memory(where, what, run):
    path = run / where / "zarr.json"
    content = json.loads(path.read_text())
    huge = [2**33] * len(content["shape"])
    if what == "shape":
        content["shape"] = huge
    else:
        content["chunk_grid"]["configuration"]["chunk_shape"] = huge
    path.write_text(json.dumps(content))
    tracemalloc.start()
    store = RunStore(run)
    with pytest.raises(CorruptRunError):
        store.rows.columns("first.weight", 0, 4)
        store.samples.per_sample("loss")
        store.grams.read("first.weight")
        store.means.mean("first.weight", 0, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_a_chunk_that_unpacks_to_more_than_it_may_is_refused(run):
    from numcodecs import Blosc

    bomb = Blosc(cname="lz4", clevel=9).encode(np.zeros(1 << 28, np.uint8))
    chunk = run / "gradients/first.weight/c/0/0"
    chunk.write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(CorruptRunError):
        RunStore(run).rows.columns("first.weight", 0, 4)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


LINKS = ["manifest.json", "done/rows-000000.json", "gradients", "samples/loss", "gram/first.weight", "mean/first.bias"]
LINKS += ["gradients/first.weight/c/0/0", "eigenvectors/global"]


@pytest.mark.parametrize("where", LINKS)
def test_links_that_lead_out_of_a_run_are_not_followed(where, run, tmp_path):
    inside, outside = run / where, tmp_path / "outside"
    shutil.move(inside, outside)
    inside.symlink_to(outside)
    before = {path: path.read_bytes() for path in [outside, *outside.rglob("*")] if path.is_file()}
    with pytest.raises(CorruptRunError, match=r"link"):
        opened = open_run(run)
        opened.store.samples.skipped()
        for name, size in opened.parameters.items():
            opened.store.rows.columns(name, 0, size)
            opened.store.means.mean(name, 0, size)
        opened.losses  # noqa: B018
        opened.spectrum("parameter")
        open_eigenvectors(run, "global")
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_or_hostile_run_never_gives_anything_but_our_errors(whole, tmp_path):
    """Seeded changes of all JSON files of a run, sealed anew or not."""
    generator = random.Random(11)
    values = [None, True, -1, 0, 2**70, 1e308, "x", "../../etc", [], {}, [[[]]], {"a": {"b": []}}, "NaN"]
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*.json") if "spectrum" not in path.name)
    refused = 0
    for number in range(40):
        run = tmp_path / str(number)
        shutil.copytree(whole, run)
        path = run / generator.choice(names)
        content = json.loads(path.read_text())
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = generator.choice(list(keys))
            if isinstance(node[key], dict | list) and node[key] and generator.random() < 0.7:
                node = node[key]
                continue
            node[key] = generator.choice(values)
            break
        if generator.random() < 0.5 and path.name != "zarr.json":
            content.pop("seal", None)
            write_json(path, content)
        else:
            path.write_text(json.dumps(content))
        for ask in (_read, lambda at: verify(open_run(at))):
            try:
                refused += bool(ask(run))  # `verify` returns what it found
            except StreamfisherError:
                refused += 1
        shutil.rmtree(run)
    assert refused > 25


def _read(path):
    run = open_run(path)
    run.info()
    run.store.samples.fields()
    run.spectrum("layer")
    open_eigenvectors(path, "global").tensors()


def test_names_of_parameters_and_fields_stay_inside(tmp_path):
    class Awkward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.ParameterDict({"a/b": torch.ones(3), "/root": torch.ones(3)})

        def forward(self, x):
            return (x * (self.inner["a/b"] + self.inner["/root"])).sum(dim=-1, keepdim=True)

    data = [{"x": torch.randn(3), "labels": torch.randn(1), "../../field": torch.tensor(1.0)} for _ in range(4)]
    made = streamfisher.collect(
        Awkward(), data, tmp_path / "run.zarr", loss=lambda model, batch: model(batch["x"])[:, 0] ** 2
    )
    made.spectrum("parameter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.zarr"]
    assert "../../field" in made.store.samples.fields()


def test_a_hostile_config_in_a_manifest_is_refused(run):
    manifest = read_json(run / "manifest.json")
    write_json(run / "manifest.json", manifest | {"config": manifest["config"] | {"chunk_size": -1}})
    with pytest.raises(ConfigError, match="chunk_size=-1"):
        open_run(run)
    assert cli("info", run) == 2
    assert SpectralConfig.from_dict(manifest["config"]).chunk_size == 8


@pytest.mark.parametrize("gone", ["done/mean-000001.json", "eigenvectors/zarr.json", "gram_mean/zarr.json"])
def test_a_file_that_was_written_and_is_gone_is_named_and_comes_back(gone, run):
    content = (run / gone).read_bytes()
    (run / gone).unlink()
    found = verify(open_run(run))
    assert found, gone
    verify(open_run(run), repair=True)
    if gone.endswith("zarr.json"):
        assert (run / gone).read_bytes() == content and not verify(open_run(run))
    else:  # the sums are made again, then the mean
        assert not (run / "done" / "mean.json").exists()
