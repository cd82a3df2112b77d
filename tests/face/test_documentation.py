"""The Python code of the README and of the documents runs as it stands, and the documents name what exists."""

import re
import tomllib
from pathlib import Path

import options_page
import pytest
import yaml
from command_line import build_parser

from streamfisher import __version__

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "howto.md"]


def python_blocks():
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)):
            yield pytest.param(code, id=f"{page.name}-{number}")


@pytest.mark.parametrize("code", list(python_blocks()))
def test_python_code_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "documentation", "exec"), {"__name__": "documentation"})


def test_options_named_in_the_documents_exist():
    commands = next(action for action in build_parser()._actions if hasattr(action, "choices") and action.choices)
    known = {
        option for parser in commands.choices.values() for action in parser._actions for option in action.option_strings
    }
    foreign = {"--nproc_per_node", "--num_processes"}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z_]*", page.read_text()))
        assert named - known - foreign == set(), page.name


def test_links_between_documents_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            if "://" in target:
                continue
            there = page.parent / name if name else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(there.read_text()), f"{page.name}: {target}"


def anchors(text):
    """Return what headings are called in links, as GitHub and mkdocs make it."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower().strip()).replace(" ", "-") for heading in headings}


def test_page_of_options_is_that_of_their_definitions():
    assert options_page.page() == options_page.PAGE.read_text(), "python tests/options_page.py writes it anew"


def test_the_page_of_architecture_has_every_room():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = [name for name in layers if (ROOT / "streamfisher" / name).is_dir()]
    drawn = re.findall(r'font-weight="bold"[^>]*>([a-z]+)</text>', (ROOT / "docs/images/architecture.svg").read_text())
    assert [name for name in drawn if name in rooms][: len(rooms)] == rooms
    walk = (ROOT / "docs/architecture.md").read_text().split("## The way of one sample")[1].split("\n## ")[0]
    assert sorted(re.findall(r"`([a-z]+)/`", walk)) == sorted(rooms)


def test_the_citation_is_of_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
