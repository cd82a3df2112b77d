"""The Python code of docs/analysis.md runs as it stands, from top to bottom, and its options exist."""

import re
from pathlib import Path

from command_line import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "documentation"}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(compile(code, PAGE.name, "exec"), names)
    assert "Interval(" in capsys.readouterr().out


def test_the_commands_of_the_page_are_understood():
    commands = re.findall(r"^    streamfisher (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        build_parser().parse_args(command.split())
