"""The Python code of the pages about samples runs as it stands, from top to bottom, and their commands exist."""

import re
from pathlib import Path

import pytest
from command_line import build_parser

PAGES = [Path(__file__).parents[2] / "docs" / f"{name}.md" for name in ("samples", "influence", "mislabelled")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch, capsys):
    if page.stem == "mislabelled":
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "documentation"}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(code, page.name, "exec"), names)
    assert capsys.readouterr().out
    if page.stem == "mislabelled":
        assert all(precision > 0.8 for precision in names["precisions"].values()), names["precisions"]
        assert names["harm"] > 0.4  # chance: 0.05


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_page_are_understood(page):
    commands = re.findall(r"^    streamfisher (.*)$", page.read_text(), flags=re.MULTILINE)
    assert commands
    for command in commands:
        build_parser().parse_args(command.split())
