"""A run read as docs/format.md says, with zarr and numpy alone: nothing of streamfisher but to make the run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from tiny_runs import make_run, rows

import streamfisher as sf

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"


def reader() -> str:
    """Return the reader that the document prints."""
    return DOCUMENT.read_text().split("```python\n")[1].split("```")[0]


CASES = {
    "float64": {},
    "bfloat16": {"dtype_store": "bfloat16", "dtype_compute": "float32", "dtype_model": "float32"},
    "stored centered": {"store_centered": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_reader_of_the_document_reads_a_run_without_this_package(options, tmp_path):
    run = make_run(tmp_path / "run.zarr", **options)
    spectrum = run.spectrum("none", False).global_
    run.spectrum("none").to_json(run.path / "spectrum.json")
    checks = """
import sys
assert not any(name.split(".")[0] == "streamfisher" for name in sys.modules)
out = {
    "version": manifest["format_version"],
    "complete": complete,
    "parameters": list(rows),
    "loss": loss.tolist(),
    "valid": valid.tolist(),
    "gradient": {name: values.tolist() for name, values in rows.items()},
    "eigenvalues": eigenvalues.tolist(),
}
json.dump(out, open(sys.argv[2], "w"))
"""
    code = reader().replace('"run.zarr"', "__import__('sys').argv[1]") + checks
    target = tmp_path / "found.json"
    command = [sys.executable, "-W", "ignore", "-c", code, str(run.path), str(target)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(target.read_text())
    assert found["version"] == run.manifest.format_version
    assert found["complete"] is True
    assert found["parameters"] == list(run.parameters)
    assert found["loss"] == run.losses.tolist()
    for name, values in found["gradient"].items():
        expected = rows(run, [name])
        if run.store.centered:
            expected = expected + run.store.means.mean(name, 0, run.parameters[name])
        assert np.array_equal(np.array(values), expected)
    np.testing.assert_allclose(found["eigenvalues"][: len(spectrum.eigenvalues)], spectrum.eigenvalues, atol=1e-9)


def test_the_document_names_the_version_and_every_node(tmp_path):
    text = DOCUMENT.read_text()
    run = make_run(tmp_path / "run.zarr", store_centered=True)
    run.eigenvectors("global", 2, block_structure="none")
    assert f"format version {run.manifest.format_version}" in text.lower()
    for entry in run.path.iterdir():
        assert f"`{entry.name}" in text, f"docs/format.md does not name {entry.name}"
    for key in run.manifest.to_dict():
        assert f"`{key}`" in text, f"docs/format.md does not name {key} of manifest.json"


def test_xarray_opens_grams_samples_and_eigenvectors(tmp_path):
    xarray = pytest.importorskip("xarray")
    run = make_run(tmp_path / "run.zarr")
    run.eigenvectors("global", 2, block_structure="none")
    grams = xarray.open_zarr(run.path / "gram", consolidated=False)
    assert np.array_equal(grams["first.weight"].values, run.gram("first.weight"))
    assert grams["first.weight"].dims == ("sample", "sample_j")
    samples = xarray.open_zarr(run.path / "samples", consolidated=False)
    assert np.array_equal(samples["loss"].values, run.losses)
    assert samples["squared_norm"].dims == ("sample", "parameter")
    gradients = xarray.open_zarr(run.path / "gradients", consolidated=False)
    assert gradients["first.weight"].dims == ("sample", "element of first.weight")
    vectors = xarray.open_zarr(run.path / "eigenvectors" / "global", consolidated=False)
    assert vectors["projections"].dims == ("sample", "eigenvector")
    assert sum(float((grams[name] ** 2).sum()) for name in grams) > 0


def test_a_run_of_another_version_is_refused(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    manifest = run.manifest.to_dict() | {"format_version": 999}
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(sf.StreamfisherError, match="999"):
        sf.open_run(run.path)


def test_tied_names_need_quoting_and_are_read_back(tmp_path):
    model = tiny_models.causal()
    run = sf.collect(model, tiny_models.sequences(), tmp_path / "run.zarr")
    assert (run.path / "gradients" / "embedding.weight").is_dir()
