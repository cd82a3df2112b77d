"""The samples on the page: where they are on the map, what the pointer says, which ones matter most."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from command_line import cli
from tiny_models import TinyCausal
from tiny_runs import make_run

import streamfisher as sf
from streamfisher.reports import html_report, sample_map

pytest.importorskip("matplotlib")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LINES = ["<b>bold</b> text", "a line", "another line", "a line with\x1b[31m red", "the fifth", "and the last one"]


class Decoder:
    def __call__(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "run.zarr"
    samples = sf.text_samples(LINES, Decoder())
    return sf.collect(TinyCausal(), samples, path, config=sf.SpectralConfig(store_text=40, chunk_size=2))


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert cli("report", run.path, "--blocks", "layer", "--out", out, "--quiet") == 0
    return out


def dots(text):
    return re.findall(r'<circle cx="(\S+)" cy="(\S+)" .*?data-loadings="(.*?)"><title>(.*?)</title>', text, re.DOTALL)


def test_each_sample_is_a_dot_where_its_loadings_are(page, run):
    found = run.samples(top=6)
    drawn = dots(page.read_text())
    assert len(drawn) == len(LINES)
    most = np.abs(found.loadings).max(axis=0)
    for x, y, loadings, title in drawn:
        number = int(re.match(r"sample (\d+): ", title)[1])
        np.testing.assert_allclose([float(value) for value in loadings.split()], found.loadings[number], rtol=1e-3)
        assert float(x) == pytest.approx(200 + 180 * found.loadings[number, 0] / most[0], abs=0.06)
        assert float(y) == pytest.approx(150 - 135 * found.loadings[number, 1] / most[1], abs=0.06)
        assert f"loss {found.fields['loss'][number]:.4g}" in title


def test_what_samples_say_is_text_and_nothing_else(page):
    text = page.read_text()
    assert "<b>bold" not in text and "\x1b" not in text
    titles = [html.unescape(title) for *_, title in dots(text)]
    assert any("<b>bold</b> text" in title for title in titles) and any("\\x1b[31m red" in title for title in titles)


def test_the_table_has_what_leaving_samples_out_moves(page, run):
    found = run.samples(top=6)
    text = page.read_text()
    table = text[text.index("Samples that matter most") :]
    body = table[: table.index("</table>")]
    rows = [re.findall(r'data-value="(.*?)"', row) for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)[1:]]
    assert len(rows) == len(LINES)
    changes = {int(row[0]): float(row[-3]) for row in rows}
    for number, change in changes.items():
        assert change == pytest.approx(found.without.change("largest_eigenvalue")[number], rel=1e-12)
    most = max(abs(float(value)) for value in rows[0][-3:])
    assert most == max(abs(float(value)) for row in rows for value in row[-3:]), "the first moves most"


def test_queries_and_samples_that_are_not_asked_for_are_not_on_it(run, tmp_path):
    spectrum = run.spectrum("layer", samples=slice(0, 4))
    text = html_report(run, [spectrum], tmp_path / "page.html", samples=slice(0, 4)).path.read_text()
    assert {int(re.match(r"sample (\d+)", title)[1]) for *_, title in dots(text)} == {0, 1, 2, 3}


def test_where_there_is_no_map_the_page_says_why(tmp_path, monkeypatch):
    projected = make_run(tmp_path / "projected.zarr", project=2)
    found = sample_map.sample_map(projected, projected.block_grams("layer"))
    assert found["dots"] == [] and "--project 2" in found["note"]
    run = make_run(tmp_path / "run.zarr")
    monkeypatch.setattr(sample_map, "_MOST_SAMPLES", 23)
    text = html_report(run, [run.spectrum("layer")], tmp_path / "page.html").path.read_text()
    assert "Of more than 23 samples no map is drawn; streamfisher samples run.zarr" in text and not dots(text)
    monkeypatch.undo()
    monkeypatch.setattr(sample_map, "_MOST_DRAWN", 5)
    found = sample_map.sample_map(run, run.block_grams("layer"))
    assert len(found["dots"]) == 5 and "Drawn are the 5 samples" in found["note"]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH (Debian: apt-get install chromium)")
def test_any_two_eigenvectors_can_be_the_axes(page, run, tmp_path):
    clicks = """<script>
    const figure = document.querySelector("figure.samples"), selects = figure.querySelectorAll("select");
    selects[0].value = "3"; selects[0].dispatchEvent(new Event("change"));
    const moved = [...figure.querySelectorAll("circle")].map(dot => [dot.dataset.loadings, dot.getAttribute("cx")]);
    document.title = JSON.stringify([selects.length, selects[1].options.length, moved]);
    </script>"""
    free = tmp_path / "free.html"
    free.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("</body>", clicks + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", free.absolute().as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    axes, choices, moved = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    assert axes == 2 and choices == len(run.samples(top=6).eigenvalues) == 6
    loadings = np.array([[float(value) for value in row.split()] for row, _ in moved])[:, 3]
    expected = 200 + 180 * loadings / np.abs(loadings).max()
    np.testing.assert_allclose([float(x) for _, x in moved], expected, atol=0.06)
