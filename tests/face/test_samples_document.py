"""The Python code of docs/samples.md runs as it stands, from top to bottom, and its commands exist."""

import re
from pathlib import Path

import pytest
from command_line import build_parser

PAGES = [Path(__file__).parents[2] / "docs" / "samples.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_the_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "documentation"}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(code, page.name, "exec"), names)
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_page_are_understood(page):
    commands = re.findall(r"^    streamfisher (.*)$", page.read_text(), flags=re.MULTILINE)
    assert commands
    for command in commands:
        build_parser().parse_args(command.split())
