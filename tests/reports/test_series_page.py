"""The page about a series of checkpoints: every block's trajectory, and overlaps where there are eigenvectors."""

import html
import re
import shutil

import numpy as np
import pytest
from command_line import cli
from tiny_runs import PATTERNS, make_run

from streamfisher import compare
from streamfisher.reports import comparison_page
from streamfisher.reports.series_page import places_of

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    return [make_run(folder / f"step-{100 * seed:06d}.zarr", seed=seed) for seed in range(4)]


def test_the_page_has_the_trajectory_of_every_block(series, tmp_path, capsys):
    page = tmp_path / "series.html"
    assert cli("compare", *(run.path for run in series), "--blocks", "parameter", "--html", page, "--quiet") == 0
    text = html.unescape(page.read_text())
    for section in ("Trajectories", "Overlap of leading eigenspaces", "Spectra", "Metrics"):
        assert f">{section}</h2>" in text
    for metric in ("largest eigenvalue", "trace", "effective rank"):
        assert f'aria-label="Trajectory: {metric}"' in text
    drawn = re.search(r'aria-label="Trajectory: trace" data-plot="(.*?)" ', page.read_text())[1]
    assert all(name in drawn for name in (*series[0].parameters, "whole model"))
    expected = compare(series, "parameter", top=0).trajectory("trace", "first.weight")
    assert all(f"{value:.4g}" in text for value in expected)
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "Where did the trace go?" in line]
    assert said and said[0].split("? ", 1)[1] in text


def test_nothing_in_a_name_is_html(series, tmp_path):
    comparison = compare(series[:2], PATTERNS, labels=["<b>first</b>", "second"])
    text = comparison_page(comparison, tmp_path / "page.html").path.read_text()
    assert "<b>" not in text and "&lt;b&gt;first" in text


def test_runs_stand_where_their_numbers_say():
    assert places_of(["step-00000000.zarr", "step-00000200.zarr", "step-00001000.zarr"]) == ([0, 200, 1000], "step")
    assert places_of(["a.zarr", "b.zarr"]) == ([1, 2], "run")
    assert places_of(["2-of-3", "3-of-4"]) == ([1, 2], "run")
    assert places_of(["step-9", "step-4"]) == ([1, 2], "run")


def test_overlaps_come_from_stored_eigenvectors_where_gradients_are_gone(series, tmp_path):
    thrifty = [make_run(tmp_path / f"step-{100 * seed}.zarr", seed=seed, keep_gradients="none") for seed in range(2)]
    bare = compare(thrifty, PATTERNS, top=3)
    assert not bare.overlaps and "gradients were not kept" in bare.warnings[-1]
    for run, of in zip(thrifty, series, strict=False):
        of.eigenvectors("first", 3, block_structure=PATTERNS)
        (run.path / "eigenvectors").mkdir(exist_ok=True)
        for folder in ("eigenvectors/first", "done/eigenvectors/first"):
            shutil.copytree(of.path / folder, run.path / folder)
    (overlap,) = compare(thrifty, PATTERNS, top=3).overlaps
    (expected, _) = compare(series[:2], PATTERNS, top=3).overlaps
    assert overlap.block == "first" and overlap.n_params == expected.n_params
    np.testing.assert_allclose(overlap.cosines, expected.cosines, atol=1e-6)
