"""The page about a run: complete, self-contained, and without an error in a real browser."""

import base64
import hashlib
import html
import json
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
    assert "20 subsets without 2 samples" in text
    assert text.count("<svg") == 3 * 2 + 1 + 2 + 1 + 1
    assert text.count('class="heat"') == 2
    order = [text.index(word) for word in ('class="verdict"', "<nav", 'class="heat"', "data-plot", 'class="metrics"')]
    assert order == sorted(order), "words, contents, maps, curves, tables"


def test_the_verdict_is_at_the_top_and_is_printed(demo_run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli("report", demo_run.path, "--blocks", "layer", "--out", out, "--quiet") == 0
    printed = capsys.readouterr().out
    questions = ["What dominates?", "Is there a gap?", "How many directions?", "Is it block-diagonal?", "Is N enough?"]
    page = html.unescape(out.read_text())
    for question in questions:
        answer = next(line.split("? ", 1)[1] for line in printed.splitlines() if question in line)
        assert f">{question}</dt><dd>{answer}</dd>" in page
    assert f"The report is in {out}" in printed


def test_growth_that_would_take_too_long_is_left_out_and_said(demo_run, tmp_path):
    spectrum = demo_run.spectrum("layer")
    text = html_report(demo_run, [spectrum], tmp_path / "page.html", seconds=0.0).path.read_text()
    assert "would have taken more than 0 s in all: 8 samples" in text
    assert "Is N enough?" not in text and "What dominates?" in text


def test_nothing_is_loaded_from_outside(page):
    text = page.read_text()
    script = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert len(script) == text.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text, "the browser runs this script and no other"
    assert not re.search(r"fetch|XMLHttp|import\(|eval|innerHTML", script[0])
    links = re.findall(r"""(?:\bsrc|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import\s*(\S+)""", text)
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
    spoiled.write_text(page.read_text().replace("<nav", '<img src="https://example.org/x.png"><nav'))
    assert any("Content Security Policy" in line for line in browse(spoiled, tmp_path / "spoiled.png"))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH (Debian: apt-get install chromium)")
def test_tables_sort_and_curves_answer(page, demo_run, tmp_path):
    """With a second script, which only a page without the policy runs, that clicks and looks."""
    clicks = """<script>
    const table = document.querySelector("table.metrics");
    const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
    const column = [...table.tHead.rows[0].cells].findIndex(head => head.textContent === "trace");
    const before = names();
    table.tHead.rows[0].cells[column].firstChild.click();
    const traces = [...table.tBodies[0].rows].map(row => +row.cells[column].dataset.value);
    const sorted = traces.every((value, i) => !i || value <= traces[i - 1]);
    const svg = document.querySelector("svg[data-plot]"), plot = JSON.parse(svg.dataset.plot);
    const button = svg.nextElementSibling.children[1];
    const line = document.getElementById(plot.curves[1][0]);
    const box = line.getBoundingClientRect();
    const point = new PointerEvent("pointermove", {clientX: box.left + 1, clientY: box.top + 1});
    svg.dispatchEvent(point);
    const tip = svg.closest("figure").querySelector(".tip").textContent;
    button.click();
    document.title = JSON.stringify([before.length, sorted, button.textContent, line.style.display, tip]);
    </script>"""
    free = tmp_path / "free.html"
    free.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("</body>", clicks + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += ["--window-size=1150,2000", f"--user-data-dir={tmp_path / 'profile'}", free.absolute().as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    rows, in_order, name, display, tip = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    assert (rows, in_order, name, display) == (5 + 2, True, "layer_0", "none")
    found = re.fullmatch(r"layer_0, (\d+): (\S+)", tip)
    value = demo_run.spectrum("layer").blocks["layer_0"].eigenvalues[int(found[1]) - 1]
    assert float(found[2]) == pytest.approx(value, rel=0.01)


def test_an_unfinished_run_is_marked_on_the_page(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    forget_last_unit(run)
    spectrum = run.spectrum("none", partial=True)
    text = html_report(run, [spectrum], tmp_path / "page.html", partial=True).path.read_text()
    assert "Partial run: 16 of 24 samples are collected" in text


def test_notebooks_show_runs_and_spectra(demo_run):
    shown = open_run(demo_run.path)._repr_html_() + demo_run.spectrum("module")._repr_html_()
    assert "<table" in shown
    assert "attention" in shown


def test_names_are_escaped(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    spectrum = run.spectrum({"first.*": "<script>alert(1)</script>", "*": "a&b"})
    text = html_report(run, [spectrum], tmp_path / "page.html").path.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_names_are_shown_in_figures_and_make_no_formulas():
    from xml.etree import ElementTree

    import numpy as np

    from streamfisher.reports.figures import heat_map

    rows, columns = ["$\\frac{1}{$ \\undefined{", "<b>"], ["_hidden", "\x1b]0;\u202e"]
    drawn = heat_map(np.ones((2, 2)), rows, columns, "$title\x1b", label="x")
    ElementTree.fromstring(drawn)
    shown = html.unescape(drawn)
    assert all(name in shown for name in (*rows, "_hidden", "\\x1b]0;\\u202e")) and "\x1b" not in shown
