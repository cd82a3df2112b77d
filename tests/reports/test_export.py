"""What is exported is what was solved, to the last bit, in every format."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import cli
from safetensors import safe_open
from tiny_runs import make_run

from streamfisher.reports import FORMATS, eigenvalue_table, metric_table, to_frame


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("export") / "run.zarr")


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    pytest.importorskip("pyarrow")
    for kind in FORMATS:
        options = ("--blocks", "parameter,none", "--center", "both", "--quiet")
        assert cli("export", run.path, "--to", kind, "--out", folder / f"s.{kind}", *options) == 0
    return folder


def expected(run):
    return run.spectrum("parameter", True).blocks["first.weight"]


def test_csv_has_every_eigenvalue_and_metric_exactly(run, files):
    rows = list(csv.DictReader((files / "s.eigenvalues.csv").open()))
    found = [r for r in rows if (r["structure"], r["centered"], r["block"]) == ("parameter", "True", "first.weight")]
    assert [float(row["eigenvalue"]) for row in found] == expected(run).eigenvalues.tolist()
    metrics = list(csv.DictReader((files / "s.csv").open()))
    assert len(metrics) == 2 * (len(run.parameters) + 2) + 2
    last = [(r["block"], r["of"]) for r in metrics if r["structure"] == "parameter" and r["centered"] == "False"][-2:]
    assert last == [("global", "union of blocks"), ("whole_model", "whole model")]
    assert [r["of"] for r in metrics if r["structure"] == "none"] == ["whole model"] * 2
    row = next(r for r in metrics if r["block"] == "first.weight" and r["centered"] == "True")
    assert float(row["effective_rank"]) == expected(run).metrics["effective_rank"]


def test_tables_have_every_metric_that_the_documents_promise(run):
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().split("## ")[0]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall("`(.*?)`", cell)]
    first = [f"cumulative_variance{name}" if name in ("_10", "_100") else name for name in names]
    assert len(first) > 20
    spectra = [run.spectrum("parameter"), run.spectrum("none", top_k=2, config=run.config.replace(solver="iterative"))]
    table = metric_table(spectra)
    assert set(first) - table.keys() == set()
    for spectrum in spectra:
        for name, block in spectrum.blocks.items():
            here = (spectrum.metadata["block_structure"], name)
            row = list(zip(table["structure"], table["block"], strict=True)).index(here)
            asked = [key for key in block.metrics if key not in ("block_name", "top_eigenvalues")]
            assert {key: table[key][row] for key in asked} == {key: block.metrics[key] for key in asked}, name


def test_parquet_is_the_same_table(run, files):
    parquet = pytest.importorskip("pyarrow.parquet")
    spectra = [run.spectrum(s, c) for s in ("parameter", "none") for c in (False, True)]
    assert parquet.read_table(files / "s.parquet").to_pydict() == metric_table(spectra)
    assert parquet.read_table(files / "s.eigenvalues.parquet").to_pydict() == eigenvalue_table(spectra)


def test_npz_and_safetensors_hold_arrays_losses_and_facts(run, files):
    name = "parameter.centered/first.weight/eigenvalues"
    with np.load(files / "s.npz") as arrays:
        assert np.array_equal(arrays[name], expected(run).eigenvalues)
        assert np.array_equal(arrays["samples/loss"], run.losses)
        facts = json.loads(str(arrays["metadata"]))
    assert facts[1]["per_block"]["first.weight"]["trace"] == expected(run).trace
    with safe_open(files / "s.safetensors", framework="np") as arrays:
        assert np.array_equal(arrays.get_tensor(name), expected(run).eigenvalues)
        assert json.loads(arrays.metadata()["streamfisher"]) == facts


def test_json_is_that_of_the_spectrum(run, files):
    found = json.loads((files / "s.json").read_text())["spectra"][1]
    assert found == run.spectrum("parameter", True).to_dict()


def test_frames_and_intervals(run):
    pytest.importorskip("pandas")
    spectrum = run.spectrum("parameter", bootstrap=10)
    frame = to_frame(spectrum).set_index("block")
    assert frame.loc["first.weight", "trace"] == spectrum.blocks["first.weight"].trace
    assert (frame["trace_low"] < frame["trace_high"]).all()
    of_blocks = sum(len(block.eigenvalues) for block in spectrum.blocks.values())
    assert len(to_frame([spectrum], "eigenvalues")) == 2 * of_blocks + len(spectrum.whole.eigenvalues)


def test_unknown_formats_and_targets_are_refused(run, tmp_path, capsys):
    assert cli("export", run.path, "--to", "xlsx", "--quiet") == 2
    assert "'xlsx' is unknown; choose one of csv, json, npz" in capsys.readouterr().err
    assert cli("export", run.path, "--to", "csv", "--out", tmp_path / "no" / "x.csv", "--quiet") == 2
    assert "in a folder that exists" in capsys.readouterr().err
