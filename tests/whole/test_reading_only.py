"""Commands that only read leave a run as it is, to the last file, and need no right to write there."""

import json
import os
import subprocess
import sys

import pytest
from command_line import contents
from tiny_runs import make_run

#: Runs the commands of a JSON list in one process and prints what of the folder was opened for writing or changed.
_WATCHED = """
import json, os, sys
from streamfisher.cli.main import main

run, commands = sys.argv[1], json.loads(sys.argv[2])
touched = []
CHANGES = ["os." + what for what in "mkdir rename remove rmdir link symlink truncate chmod utime".split()]

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
    elif event in CHANGES:
        path = arguments[0]
        writes = not (event == "os.mkdir" and os.path.isdir(path))  # zarr asks for a folder that is there
    else:
        return
    if writes and isinstance(path, (str, os.PathLike)) and os.path.abspath(os.fspath(path)).startswith(run):
        touched.append(f"{event} {path}")

sys.addaudithook(watch)
codes = [main(command) for command in commands]
print(json.dumps({"codes": codes, "touched": touched}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = make_run(tmp_path_factory.mktemp("reading") / "run.zarr", store_centered=True)
    made.build_grams()
    return made.path


def commands(run, elsewhere):
    whole = ("--blocks", "none", "--block", "global")
    return [
        ["info", run],
        ["info", run, "--watch", "--interval", "0.01"],
        ["verify", run, "--quiet"],
        ["spectrum", run, "--quiet", "--blocks", "layer,none", "--center", "both"],
        ["spectrum", run, "--quiet", "--samples", "loss>0", "--out", f"{elsewhere}/spectrum.json"],
        ["spectrum", run, "--quiet", "--gram-dtype", "float64", "--bootstrap", "3"],
        ["density", run, "--quiet", *whole],
        ["compare", run, run, "--quiet"],
        ["export", run, "--to", "npz", "--out", f"{elsewhere}/a.npz", "--quiet"],
        ["report", run, "--out", f"{elsewhere}/report.html", "--quiet"],
        ["report", run, "--out", f"{elsewhere}/spectrum.png", "--quiet"],
    ]


def test_commands_that_only_read_touch_nothing(run, tmp_path):
    before = contents(run)
    words = json.dumps(commands(str(run), str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, str(run), words], capture_output=True, text=True, env=os.environ, check=True
    )
    said = json.loads(done.stderr.splitlines()[-1])
    assert set(said["codes"]) == {0} and said["touched"] == [], done.stderr
    assert contents(run) == before and not list(run.rglob("*.partial"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "report.html", "spectrum.json", "spectrum.png"]
