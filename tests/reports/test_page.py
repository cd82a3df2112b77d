"""The page about a run: complete, self-contained, and without an error in a real browser."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import cli
from tiny_runs import forget_last_unit, make_run

from streamfisher import SpectralConfig, collect, open_run
from streamfisher.demo import demo_samples, load_demo_model
from streamfisher.reports import html_report

pytest.importorskip("matplotlib")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "demo.zarr"
    return collect(load_demo_model(), demo_samples(16, 32), path, config=SpectralConfig(include=("layers.*", "norm.*")))


@pytest.fixture(scope="module")
def page(demo_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert cli("report", demo_run.path, "--bootstrap", 20, "--center", "no", "--out", path, "--quiet") == 0
    return path


def test_the_page_says_what_it_must(page, demo_run):
    text = page.read_text()
    for section in ("blocks: layer", "blocks: module", "blocks: none", "Spectral density", "Layers and modules"):
        assert section in text
    assert "Block alignment" in text
    assert "Was N enough?" in text
    assert f"{demo_run.spectrum('none').global_.trace:.4g}" in text
    assert demo_run.manifest.model["fingerprint"] in text
    assert "lm_head.weight" in text, "what was excluded is named"
    assert "20 resamples" in text
    assert text.count("<svg") == 3 * 2 + 1 + 2 + 2 + 1


def test_nothing_is_loaded_from_outside(page):
    text = page.read_text()
    assert "<script" not in text
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import\s*(\S+)""", text)
    for link in (part for group in links for part in group if part):
        assert link.startswith(("#", "data:")), link


def test_ids_are_unique_across_the_figures(page):
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", page.read_text()))
    assert references <= set(ids)


def test_the_same_run_gives_the_same_page(page, demo_run, tmp_path):
    again = tmp_path / "again.html"
    assert cli("report", demo_run.path, "--bootstrap", 20, "--center", "no", "--out", again, "--quiet") == 0
    assert again.read_bytes() == page.read_bytes()


def browse(page: Path, screenshot: Path) -> list[str]:
    """Return what the browser's console says of a page, and leave a screenshot."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += ["--enable-logging=stderr", "--window-size=1150,5400", f"--screenshot={screenshot}"]
    command += [f"--user-data-dir={screenshot.parent / 'profile'}", page.absolute().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert screenshot.is_file(), done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH (Debian: apt-get install chromium)")
def test_a_browser_shows_it_without_an_error(page, tmp_path):
    folder = Path(os.environ.get("STREAMFISHER_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    screenshot = folder / "report.png"
    screenshot.unlink(missing_ok=True)
    assert browse(page, screenshot) == []
    assert screenshot.stat().st_size > 50_000


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH (Debian: apt-get install chromium)")
def test_the_browser_would_say_so_if_something_came_from_outside(page, tmp_path):
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(page.read_text().replace("<h2>Facts", '<img src="https://example.org/x.png"><h2>Facts'))
    assert any("Content Security Policy" in line for line in browse(spoiled, tmp_path / "spoiled.png"))


def test_an_unfinished_run_is_marked_on_the_page(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    forget_last_unit(run)
    spectrum = run.spectrum("none", partial=True)
    text = html_report(run, [spectrum], tmp_path / "page.html", partial=True).read_text()
    assert "Partial run: 16 of 24 samples are collected" in text


def test_notebooks_show_runs_and_spectra(demo_run):
    shown = open_run(demo_run.path)._repr_html_() + demo_run.spectrum("module")._repr_html_()
    assert "<table" in shown
    assert "attention" in shown


def test_names_are_escaped(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    spectrum = run.spectrum({"first.*": "<script>alert(1)</script>", "*": "a&b"})
    assert "<script>" not in html_report(run, [spectrum], tmp_path / "page.html").read_text()


def test_names_are_shown_in_figures_and_make_no_formulas():
    import html
    from xml.etree import ElementTree

    import numpy as np

    from streamfisher.reports.figures import heat_map

    rows, columns = ["$\\frac{1}{$ \\undefined{", "<b>"], ["_hidden", "\x1b]0;\u202e"]
    drawn = heat_map(np.ones((2, 2)), rows, columns, "$title\x1b", label="x")
    ElementTree.fromstring(drawn)
    shown = html.unescape(drawn)
    assert all(name in shown for name in (*rows, "_hidden", "\\x1b]0;\\u202e")) and "\x1b" not in shown
