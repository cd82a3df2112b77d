"""Reduced campaigns: faults at every stage, damaged files, hostile ones; the full ones are `python -m campaign`."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def campaign(tmp_path, what, cases, seed):
    """Return all cases of a campaign in a process of its own, which forks: it must not have threads before."""
    found = tmp_path / "cases.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-m", "campaign", what, "--cases", str(cases), "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--json", str(found)], capture_output=True, text=True, env=environment, timeout=500
    )
    assert found.exists(), done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(found.read_text())


@pytest.mark.slow
def test_faults_at_every_stage_cost_nothing_but_what_was_in_flight(tmp_path):
    cases = campaign(tmp_path, "faults", 26, 3)
    assert len(cases) >= 25 and all(case["wrong"] == [] for case in cases)
    stages, kinds = Counter(case["stage"] for case in cases), Counter(case["kind"] for case in cases)
    assert len(stages) >= 7 and len(kinds) >= 10, (stages, kinds)
    assert sum(case["ended"] != "exit 0" for case in cases) > 15, "most faults stop the command that they strike"


@pytest.mark.slow
def test_damage_is_refused_or_harmless_and_repaired(tmp_path):
    cases = campaign(tmp_path, "corruption", 16, 5)
    assert len(cases) == 16 and all(case["wrong"] == [] for case in cases)
    assert len({case["kind"] for case in cases}) >= 4 and len({case["operation"] for case in cases}) >= 4
    assert sum(case["named"] for case in cases) >= 8


@pytest.mark.slow
def test_what_others_made_is_refused_or_answered_and_touches_nothing_outside(tmp_path):
    cases = campaign(tmp_path, "hostile", 12, 3)
    assert len(cases) >= 12 and all(case["wrong"] == [] for case in cases)
    assert len({case["kind"] for case in cases}) == 16, "one of each kind at least"
    assert all(case["commands"] >= 2 for case in cases)
    assert sum(case["refused"] for case in cases) > 40
    assert any(case["refused"] < case["commands"] for case in cases), "what does no harm is answered"
