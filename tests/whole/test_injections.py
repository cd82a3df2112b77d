"""Names, descriptions, reasons and log lines of a run that would act on a terminal or in a spreadsheet."""

import csv
import json

import pytest
import torch
from command_line import cli

import streamfisher
from streamfisher.runtime import read_json, write_json

EVIL = "\x1b]0;pwned\x07\x1b[2J\u202e\nstreamfisher: all is well\r=cmd|' /C calc'!A0"


class Awkward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.ParameterDict({EVIL: torch.ones(3), "=2+3": torch.ones(3), "-1": torch.ones(3)})

    def forward(self, x):
        return sum((x * value**2).sum(dim=-1) for value in self.inner.values())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(3, generator=generator), "labels": torch.zeros(1)} for _ in range(6)]
    path = tmp_path_factory.mktemp("injections") / "run.zarr"
    run = streamfisher.collect(
        Awkward(), data, path, loss=lambda model, batch: model(batch["x"]) ** 2, description=EVIL
    )
    manifest = read_json(path / "manifest.json")
    manifest["model"]["class"] = manifest["loss"]["loss_reduction"] = EVIL
    manifest["excluded"] = {EVIL: EVIL}
    manifest["data"]["sample_unit"] = EVIL
    manifest["probe"]["notes"] = [EVIL]
    manifest["probe"]["excluded"] = {EVIL: EVIL}
    for name in ("manifest.json", "manifest.copy.json"):
        write_json(path / name, manifest)
    with (path / "log.jsonl").open("a") as file:
        file.write(json.dumps({"event": "warning", "rank": 0, "stage": EVIL, "message": EVIL, "time": EVIL}) + "\n")
    run.build_grams()
    return path


def assert_harmless(text):
    assert text.replace("\n", "").isprintable(), ascii(text)
    assert not any(line.startswith("streamfisher: all is well") for line in text.split("\n"))


@pytest.mark.parametrize(
    "command",
    [
        ("info", "RUN"),
        ("info", "RUN", "--watch", "--interval", "0.01"),
        ("spectrum", "RUN", "--blocks", "parameter", "--bootstrap", "5"),
        ("spectrum", "RUN", "--blocks", "parameter", "--json"),
        ("density", "RUN", "--blocks", "parameter", "--block", f"inner.{EVIL}"),
        ("density", "RUN", "--blocks", "parameter", "--block", "none"),
        ("eigenvectors", "RUN", "--blocks", "parameter", "--block", f"inner.{EVIL}", "--top", "1"),
        ("compare", "RUN", "RUN", "--blocks", "parameter"),
        ("gram", "RUN", "--rebuild"),
        ("verify", "RUN"),
    ],
    ids=lambda command: " ".join(command[:2] if "--watch" in command else command[:1]),
)
def test_nothing_that_is_printed_acts_on_the_terminal(command, run, capsys):
    code = cli(*(run if word == "RUN" else word for word in command), "--quiet")
    shown = capsys.readouterr()
    assert code == (2 if "none" in command else 0), shown.err
    assert_harmless(shown.out)
    assert_harmless(shown.err)
    assert shown.out or shown.err


def test_damage_is_named_harmlessly(run, capsys):
    chunk = next((run / "gradients").glob("inner.%1B*/c/0/0"))
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    for command in (("verify", run), ("gram", run, "--rebuild")):
        assert cli(*command, "--quiet") == 4
        shown = capsys.readouterr()
        assert_harmless(shown.out)
        assert_harmless(shown.err)
        assert "pwned" in shown.out + shown.err
    chunk.write_bytes(content)


def test_no_cell_of_a_table_is_a_formula(run, tmp_path):
    assert cli("export", run, "--to", "csv", "--blocks", "parameter", "--out", tmp_path / "a.csv", "--quiet") == 0
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps({"inner.=2+3": "=2+3", "inner.-1": "-1", "*": "@sum"}))
    assert cli("export", run, "--to", "csv", "--blocks", path, "--out", tmp_path / "b.csv", "--quiet") == 0
    for name in ("a.csv", "b.csv", "a.eigenvalues.csv", "b.eigenvalues.csv"):
        with (tmp_path / name).open(newline="") as file:
            rows = list(csv.reader(file))
        for cell in (cell for row in rows for cell in row):
            try:
                float(cell)
            except ValueError:
                assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert {"'=2+3", "'-1", "'@sum"} <= {cell for row in rows for cell in row}
