"""The site: tutorials that were executed, pages that build strictly without a network, links that lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import tutorial_pages
import yaml
from command_line import build_parser

ROOT = Path(__file__).parents[2]


def without_numbers(text):
    """Return what a page says, but for figures, which differ between machines, and for the room that they take."""
    words = re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?%?", "#", text or "")
    return re.sub(r"[ -]+", " ", words)


@pytest.mark.slow
@pytest.mark.parametrize("page", tutorial_pages.PAGES, ids=lambda page: page.stem)
def test_tutorials_print_what_they_show(page, tmp_path, monkeypatch):
    if "peft" in page.read_text() and "```python" in page.read_text():
        pytest.importorskip("peft")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    shown = list(tutorial_pages.blocks(page.read_text()))
    printed = list(tutorial_pages.blocks(tutorial_pages.executed(page.read_text())))
    for (code, before), (_, now) in zip(shown, printed, strict=True):
        assert without_numbers(before) == without_numbers(now), f"python tests/tutorial_pages.py writes it anew: {code}"


def test_commands_of_the_tutorials_are_understood():
    commands = [
        command
        for page in tutorial_pages.PAGES
        for command in re.findall(r"^    streamfisher (.*)$", page.read_text(), flags=re.MULTILINE)
    ]
    assert len(commands) >= 6
    for command in commands:
        build_parser().parse_args(command.split())


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.ids, self.loaded = [], set(), []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.targets.append(found["href"])
        if tag in ("script", "img") and found.get("src"):
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon") and found.get("href"):
            self.loaded.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra `docs`)")
    folder = tmp_path_factory.mktemp("site")
    code = "import socket; socket.socket.connect = None; from mkdocs.__main__ import cli; cli()"  # there is no network
    command = [sys.executable, "-c", code, "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {}
    for page in folder.rglob("*.html"):
        pages[page.resolve()] = Links()
        pages[page.resolve()].feed(page.read_text())
    return folder.resolve(), pages


def test_every_link_of_the_site_leads_to_a_page_and_a_heading(site):
    folder, pages = site
    assert len(pages) > 35
    for page, links in pages.items():
        if page.name == "404.html":  # its links are of the address where the site will be
            continue
        for target in links.targets:
            if re.match(r"(https?|mailto):", target):
                continue
            name, _, anchor = unquote(target).partition("#")
            there = (page.parent / name).resolve() if name else page
            there = there / "index.html" if there.is_dir() else there
            assert there.exists() and folder in there.parents, f"{page.relative_to(folder)}: {target}"
            if anchor and there in pages and not anchor.startswith("__"):
                assert anchor in pages[there].ids, f"{page.relative_to(folder)}: {target}"


def test_the_site_loads_nothing_from_elsewhere(site):
    _, pages = site
    loaded = {source for links in pages.values() for source in links.loaded}
    assert loaded and not [source for source in loaded if re.match(r"(https?:)?//", source)]


def test_every_public_name_is_in_the_reference(site):
    import streamfisher

    _, pages = site
    ids = set().union(*(links.ids for page, links in pages.items() if "api" in page.parts))
    found = {name.rpartition(".")[2] for name in ids}
    assert set(streamfisher.__all__) - {"__version__"} <= found


def test_package_indexes_get_a_readme_whose_links_and_pictures_are_absolute():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    pytest.importorskip("hatchling")
    spec.loader.exec_module(module)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    text = module.absolute((ROOT / "README.md").read_text(), repository)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 20 and all(target.startswith(("https://", "#")) for target in targets)
    for target in targets:
        if target.startswith(f"{repository}/"):
            assert (ROOT / target.removeprefix(f"{repository}/").split("/", 2)[2].partition("#")[0]).exists(), target


def test_the_workflows_call_the_two_commands_of_the_readme():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    two = re.findall(r"^ {4}(bash (?:examples|tests)/\w+\.sh)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(two) == 2 and all(any(command.startswith(one) for command in commands) for one in two)


def test_types_are_published():
    assert (ROOT / "streamfisher" / "py.typed").exists()
