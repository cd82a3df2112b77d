"""Every byte that enters a result is bound to its place: each line of the table in docs/format.md, damaged and read."""

import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import zarr
from command_line import main
from factored_models import convolution, images
from small_parameters import Layers, layered

import streamfisher as sf
from streamfisher import verify
from streamfisher.errors import CorruptRunError, StreamfisherError
from streamfisher.reduction import stored_grams
from streamfisher.reports import write_named_spectra
from streamfisher.runtime import read_json, write_json
from streamfisher.solving import tiled_gram
from streamfisher.store import open_eigenvectors
from streamfisher.verification import verify_manifest

N = 24
PAGE = Path(__file__).parents[2] / "docs" / "format.md"
UNBOUND = ["lock", "lock.ranks", "log.jsonl", "done/tiles-*/identity.json", "done/deleted-*.json"]
OPERATIONS = ("flip", "truncate", "zero", "delete", "copy", "swap")


def table():
    """Return `{paths of the first column: (patterns, readers)}` of the table."""
    section = PAGE.read_text().split("## What is bound to what")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {
        first: (
            [re.sub(r"[A-Z]+", "*", path) for path in re.findall("`(.*?)`", first)],
            [reader.strip() for reader in checked.strip(" |").split(",")],
        )
        for first, _, _, checked in lines
    }


TABLE = table()


def covers(pattern, path):
    """Return whether a pattern is that of a file, or of the array or group that the file lies in."""
    wanted, parts = pattern.split("/"), path.split("/")
    inside = (
        len(parts) == len(wanted) if pattern.endswith((".json", ".html", ".png", ".yaml")) else len(parts) > len(wanted)
    )
    return inside and all(fnmatchcase(part, name) for part, name in zip(parts, wanted, strict=False))


def line_of(path):
    """Return the line of the table that a file belongs to; `None`: nothing is bound to it."""
    if any(fnmatchcase(path, pattern) for pattern in UNBOUND):
        return None
    found = {line: [p for p in patterns if covers(p, path)] for line, (patterns, _) in TABLE.items()}
    lines = [line for line, patterns in found.items() if patterns]
    lines = [line for line in lines if "*" not in found[line][0]] or lines  # a name of its own before any group's
    assert len(lines) == 1, f"{path} is of {lines}"
    return lines[0]


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_gram, "TILE", 12)
        patch.setattr(stored_grams, "TILE", 12)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return finished runs: Grams in one piece with all that can lie beside them, Grams by tiles, factors."""
    folder = tmp_path_factory.mktemp("bound")
    whole = tiny_runs.make_run(folder / "whole.zarr", N, store_centered=True)
    whole.store.samples.write_fields({"one": np.arange(N) / 7, "other": np.arange(N) / 3})
    whole.eigenvectors("global", 2, block_structure="none")
    write_named_spectra(whole, [whole.spectrum("layer", keep=True)])
    (whole.path / "spectrum.json").write_text('{"global": 1}')
    (whole.path / "report.html").write_text("<p>report</p>")
    whole.store.markers.mark_result(whole.path / "spectrum.json")
    whole.store.markers.mark_result(whole.path / "report.html")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_grams, "needs_tiles", lambda *_: True)
        tiled = tiny_runs.make_run(folder / "tiled.zarr", N, store_centered=True)
        tiled.build_grams()
        tiled.eigenvectors("global", 2, block_structure="none")
    config = sf.SpectralConfig(chunk_size=4, dtype_compute="float64", representation="factors")
    factored = sf.collect(convolution().double(), images(N), folder / "factored.zarr", config=config)
    factored.build_grams()
    config = config.replace(representation="dense", keep_gradients=("*",))
    packed = sf.collect(Layers(5).double(), layered(N), folder / "packed.zarr", config=config)
    packed.build_grams()
    return {run.path.stem: run.path for run in (whole, tiled, factored, packed)}


def in_parts(path):
    run = sf.open_run(path)
    return run, run.config.replace(memory_budget="10kB")


def spectrum(run, *how, **options):
    found = run.spectrum(*how, **options)
    return [part for block in found.blocks.values() for part in (block.eigenvalues, block.trace)]


def memory(path):
    run = sf.open_run(path)
    return spectrum(run, "parameter", False) + spectrum(run, "none", True)


def tiles(path):
    run, config = in_parts(path)
    return spectrum(run, "none", False, config=config, top_k=1) + spectrum(run, "none", True, config=config, top_k=1)


def density(path):
    run, config = in_parts(path)
    grams = run.block_grams("none", False, config=config)
    return [grams.density("global", n_vectors=2, n_steps=3).density]


def rows(path):
    run = sf.open_run(path)
    found = [run.store.rows.columns(name, 0, size) for name, size in run.parameters.items()]
    return found + [run.store.means.mean(name, 0, size) for name, size in run.parameters.items()]


def samples(path):
    store = sf.open_run(path).store.samples
    fields = [part for name, values in store.fields().items() for part in (name, values)]
    return [*fields, *(store.per_sample(what) for what in ("loss", "n_targets", "valid", "squared_norm"))]


def eigenvectors(path):
    if not (path / "eigenvectors" / "global").is_dir():
        return []
    found = open_eigenvectors(path, "global")
    coefficients = np.asarray(zarr.open_array(found.path / "coefficients", mode="r"))
    return [
        found.eigenvalues,
        coefficients,
        found.projections(),
        *(tensor.numpy() for tensor in found.tensors().values()),
    ]


READERS = {reader.__name__: reader for reader in (memory, tiles, density, rows, samples, eigenvectors)}


def ask(reader, path):
    """Return an answer, or the error that refuses it; any other error is a failure."""
    try:
        return READERS[reader](path)
    except StreamfisherError as error:
        return error
    except ValueError as error:
        if reader != "eigenvectors":  # the coefficients are read with zarr alone
            raise
        return CorruptRunError(str(error))


def same(one, other, *, rebuilt=False):
    """Return whether two answers are the same, to the bit unless a Gram was built by tiles and rebuilt in one piece."""
    if rebuilt:
        return all(np.allclose(a, b, rtol=1e-12, atol=1e-12 * np.max(b)) for a, b in zip(one, other, strict=True))
    return len(one) == len(other) and all(
        np.array_equal(a, b, equal_nan=isinstance(a, np.ndarray) and a.dtype.kind == "f")
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def answers(runs):
    found = {(name, reader): ask(reader, path) for name, path in runs.items() for reader in READERS}
    assert not [answer for answer in found.values() if isinstance(answer, Exception)]
    assert all(verify(sf.open_run(path), repair=False) == [] for path in runs.values())
    return found


def damage(run, operation, path, other):
    """Damage one file, by itself or with another one; return whether it changed."""
    before = path.read_bytes()
    middle = len(before) // 2
    if operation == "delete":
        path.unlink()
        return True
    if operation in ("copy", "swap"):
        if other is None or other.read_bytes() == before:
            return False
        path.write_bytes(other.read_bytes())
        if operation == "swap":
            other.write_bytes(before)
        return True
    after = {
        "flip": before[:middle] + bytes([before[middle] ^ 0x04]) + before[middle + 1 :],
        "truncate": before[:middle],
        "zero": bytes(len(before)),
    }[operation]
    path.write_bytes(after)
    return True


def files_of(run, line):
    return sorted(
        path for path in run.rglob("*") if path.is_file() and line_of(path.relative_to(run).as_posix()) == line
    )


def chosen(files):
    """Return the first chunk or marker and the first metadata, each with another file to exchange it with."""
    found = []
    for kind in ([p for p in files if p.name != "zarr.json"], [p for p in files if p.name == "zarr.json"]):
        if kind:
            others = [path for path in kind if path.read_bytes() != kind[0].read_bytes()]
            alike = [path for path in others if path.name == kind[0].name] or others
            found.append((kind[0], alike[0] if alike else None))
    return found


def test_every_file_of_a_run_has_its_line(runs):
    files = {path.relative_to(run).as_posix() for run in runs.values() for path in run.rglob("*") if path.is_file()}
    assert {line_of(path) for path in files} - {None} == set(TABLE)


def check(runs, answers, line, operations, tmp_path, asked=tuple(READERS)):
    readers, cases, of_grams = TABLE[line][1], 0, "gram" in line or "tiles" in line
    is_array = all("/" in path and not path.endswith(".json") for path in TABLE[line][0])
    having = [name for name, whole in runs.items() if files_of(whole, line)]
    for name in having if of_grams else having[:1]:
        whole = runs[name]
        for path, other in chosen(files_of(whole, line)):
            for operation in operations:
                target, partner = (p and p.relative_to(whole) for p in (path, other))
                run = tmp_path / "damaged.zarr"
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(whole, run)
                if not damage(run, operation, run / target, partner and run / partner):
                    continue
                cases += 1
                what = f"{name}: {operation} {target} ({partner})"
                if operation != "delete" or is_array:  # without its marker, a thing is unfinished and not damaged
                    assert named(run) == ("verify" in readers), what
                for reader in asked:
                    copied = tmp_path / "read.zarr"
                    shutil.rmtree(copied, ignore_errors=True)
                    shutil.copytree(run, copied)
                    answer = ask(reader, copied)
                    refused = isinstance(answer, StreamfisherError)
                    rebuilt = name == "tiled" and not is_array and reader == "memory"
                    assert refused or same(answer, answers[name, reader], rebuilt=rebuilt), f"{what}: wrong {reader}"
                    if operation == "flip" and path.name != "zarr.json" and is_array and reader in readers:
                        assert isinstance(answer, CorruptRunError), f"{what}: {reader} did not notice"
    assert cases


def named(run):
    try:
        return bool(verify_manifest(run, repair=False) or verify(sf.open_run(run), repair=False))
    except StreamfisherError:
        return True


@pytest.mark.parametrize("line", TABLE)
def test_what_was_copied_from_elsewhere_is_refused_or_changes_nothing(runs, answers, line, tmp_path):
    if any(other is not None for run in runs.values() for _, other in chosen(files_of(run, line))):
        check(runs, answers, line, ["copy"], tmp_path, [reader for reader in TABLE[line][1] if reader in READERS])


@pytest.mark.slow
@pytest.mark.parametrize("line", TABLE)
def test_no_damage_is_read_on_any_path(runs, answers, line, tmp_path):
    check(runs, answers, line, OPERATIONS, tmp_path)


def older(run):
    """Make the markers of Grams those of a run that does not say which chunks they have, nor of what is beside them."""
    for path in (run / "done").glob("gram-*.json"):
        kept = {key: value for key, value in read_json(path).items() if key in ("settings", "n_samples", "tiles")}
        crc32c = read_json(path).get("crc32c")
        write_json(path, kept if crc32c is None else kept | {"crc32c": crc32c})


@pytest.mark.parametrize("name", ["whole", "tiled"])
def test_grams_of_older_runs_are_read_and_checked_in_parts_too(runs, answers, name, tmp_path):
    shutil.copytree(runs[name], tmp_path / "run.zarr")
    older(tmp_path / "run.zarr")
    for reader in ("memory", "tiles", "density"):
        assert same(READERS[reader](tmp_path / "run.zarr"), answers[name, reader])
    assert verify(sf.open_run(tmp_path / "run.zarr"), repair=False) == []
    gram = tmp_path / "run.zarr" / "gram"
    shutil.copy(gram / "first.bias/c/0/0", gram / "second.bias/c/0/0")
    for reader in ("memory", "tiles", "density"):
        with pytest.raises(CorruptRunError, match=r"Gram of second\.bias is not what was written"):
            READERS[reader](tmp_path / "run.zarr")


def test_the_command_line_refuses_the_gram_of_another_parameter_on_both_paths(runs, tmp_path, capsys):
    shutil.copytree(runs["whole"], tmp_path / "run.zarr")
    gram = tmp_path / "run.zarr" / "gram"
    shutil.copy(gram / "first.bias/c/0/0", gram / "second.bias/c/0/0")
    blocks, in_parts = sf.open_run(runs["whole"]).block_grams().blocks, ["--memory-budget", "10kB"]
    block = next(key for key, names in blocks.items() if "second.bias" in names)
    for command in (["spectrum"], ["spectrum", *in_parts], ["density", "--block", block, *in_parts]):
        assert main([command[0], str(tmp_path / "run.zarr"), *command[1:]]) == 4
        assert "the Gram of second.bias is not what was written" in capsys.readouterr().err


def test_a_rebuilt_gram_is_read_in_parts_by_a_run_that_was_opened_before(runs, tmp_path):
    shutil.copytree(runs["whole"], tmp_path / "run.zarr")
    run = sf.open_run(tmp_path / "run.zarr")
    before = run.store.grams.tile("first.bias", slice(0, 8), slice(8, 16))
    run.store.grams.write("first.bias", 2 * run.store.grams.read("first.bias")[0], None, {"dtype_gram": "float32"})
    assert np.array_equal(run.store.grams.tile("first.bias", slice(0, 8), slice(8, 16)), 2 * before)
    run.store.grams.forget("first.bias")
    with pytest.raises(CorruptRunError, match=r"Gram of first\.bias cannot be read"):
        run.store.grams.tile("first.bias", slice(0, 8), slice(8, 16))


@pytest.mark.parametrize("name", ["whole", "tiled"])
def test_products_with_the_mean_of_another_gram_or_none_are_named(runs, name, tmp_path):
    run = tmp_path / "run.zarr"
    shutil.copytree(runs[name], run)
    shutil.copy(run / "gram_mean/first.bias/c/0", run / "gram_mean/second.bias/c/0")
    with pytest.raises(CorruptRunError, match=r"products of second\.bias with the mean are not what was written"):
        sf.open_run(run).spectrum("none", False)
    shutil.rmtree(run / "gram_mean/first.bias")
    found = verify(sf.open_run(run), repair=False)
    assert [problem.parameter for problem in found] == ["first.bias", "second.bias"]
