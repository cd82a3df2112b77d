"""Hostile runs and inputs, one at a time: refused in a sentence, or answered as if nothing were wrong with them.

Each case makes a copy of a finished run hostile, or writes a hostile input, gives several commands to it, and looks at
what they printed, at what they took, and at what lies around. Each case has a seed of its own, made of the campaign's
and its number, so that one can be made again by itself.
"""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

from campaign import hostile_configs, hostile_fields, hostile_inputs, hostile_runs
from campaign.fault_campaign import WORKFLOWS, Workflow
from campaign.hostile_watch import (
    BYTES,
    CODES,
    SECRET,
    Command,
    Said,
    around,
    canaries,
    changed,
    differing,
    values_of,
    watched,
)
from campaign.workers import copy

#: Kinds of cases, and how many of 100.
KINDS = {
    "link to a file": 7,
    "link to a folder": 5,
    "hard link": 6,
    "FIFO": 5,
    "device": 4,
    "socket": 3,
    "bomb in a chunk": 8,
    "bomb in metadata": 9,
    "bomb in JSON": 8,
    "contradiction in the manifest": 12,
    "contradiction in a marker": 11,
    "contradiction between files": 3,
    "injection": 7,
    "config": 5,
    "data": 4,
    "checkpoint": 3,
}
_AWKWARD = ("run", "campaign.models:awkward", "campaign.models:awkward_vectors", "--loss", "regression")
_NAMED = Workflow(
    "awkward names", ((*_AWKWARD, "--blocks", "parameter,none", "--center", "both", "--device", "cpu", "--quiet"),)
)
STARTED = (*(work for work in WORKFLOWS if work.name in ("plain", "centered rows", "factors", "waves")), _NAMED)
_WHOLE = ("--blocks", "parameter,none", "--center", "both", "--quiet")
_ONE = ("--blocks", "none", "--block", "global", "--quiet")


@dataclass
class Case:
    """One hostile run or input, and what came of it."""

    number: int
    kind: str
    workflow: str
    seed: int
    what: str = ""  # was done
    commands: int = 0
    refused: int = 0  # commands that ended with another code than 0
    seconds: float = 0.0  # of the longest command
    peak: int = 0  # bytes of memory of the process of all its commands
    wrong: list[str] = field(default_factory=list)


class Campaign:
    """All cases on one folder.

    Args:
        folder: for runs and inputs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.finished = {work.name: folder / f"{work.name.replace(' ', '_')}.finished" for work in STARTED}
        self.workflows = {work.name: work for work in STARTED}
        self.saved = hostile_inputs.checkpoint(folder)
        for work in STARTED:
            made = [_of_run(work, index, self.finished[work.name]) for index in range(len(work.commands))]
            found = watched(made, folder, folder / "printed")
            assert [said.code for said in found.said] == [0] * len(made), [said.err.decode() for said in found.said]
        self.expected: dict[tuple[str, str], dict[str, list[float]]] = {}
        for name, run in self.finished.items():
            for command in self._reading(run, folder):
                (said,) = watched([command], folder, folder / "printed").said
                assert said.code == 0, (command.words, said.err.decode())
                self.expected[name, _question(command)] = values_of(json.loads(said.out)) if _answers(command) else {}
        (said,) = watched([hostile_inputs.reference_data(folder)], folder, folder / "printed").said
        assert said.code == 0, said.err.decode()
        self.expected["data", "ids"] = values_of(json.loads(said.out))
        assert all(self.expected[key] for key in (("plain", "spectrum"), ("plain", "density"), ("data", "ids")))

    def _reading(self, run: Path, out: Path) -> list[Command]:
        """Return commands that only look."""
        other = self.finished["plain"]
        return [
            Command(("info", run, "--json")),
            Command(("info", run)),
            Command(("spectrum", run, *_WHOLE, "--json")),
            Command(("spectrum", run, "--blocks", "none", "--memory-budget", "2kB", "--top-k", 2, "--json", "--quiet")),
            Command(("density", run, *_ONE, "--json")),
            Command(("compare", run, run if "awkward" in run.name else other, *_WHOLE[:2], "--top", 0, "--json")),
            Command(("export", run, "--to", "csv", "--out", out / "a.csv", *_WHOLE)),
            Command(("export", run, "--to", "npz", "--out", out / "a.npz", *_WHOLE)),
            Command(("report", run, "--out", out / "page.html", "--quiet"), pictures=True),
            Command(("report", run, "--out", out / "page.png", *_WHOLE), pictures=True),
            Command(("verify", run, "--quiet")),
        ]

    def _writing(self, case: Case, run: Path, dice: random.Random) -> list[Command]:
        """Return commands that go on with a run, and last how it is looked at afterwards."""
        work = self.workflows[case.workflow]
        some = [
            Command(("gram", run, "--rebuild", "--quiet")),
            Command(("gram", run, "--quiet")),
            Command(("eigenvectors", run, *_ONE, "--top", 2, "--overwrite")),
            Command(("report", run, "--quiet"), pictures=True),
        ]
        repair = Command(("verify", run, "--repair", "--quiet"))
        return [*dice.sample(some, 1), repair, _of_run(work, 0, run), Command(("spectrum", run, *_WHOLE, "--json"))]

    def draw(self, count: int, seed: int, only: str | None = None) -> list[Case]:
        """Return cases: kinds in their shares, in an order of their own; of some kinds or numbers if asked for."""
        kinds = [kind for kind, share in KINDS.items() for _ in range(max(1, round(share * count / 100)))]
        random.Random(seed).shuffle(kinds)
        cases = []
        for number, kind in enumerate(kinds):
            names = [work.name for work in STARTED if work is not _NAMED or kind == "injection"]
            workflow = "awkward names" if kind == "injection" and number % 3 == 0 else names[number % 4]
            cases.append(Case(number, kind, workflow, seed * 1_000_003 + number))
        chosen = set(only.split(",")) if only else set()
        return [case for case in cases if not only or chosen & {case.kind, str(case.number)}]

    def run(self, case: Case) -> Case:
        """Make it, give the commands, and judge what came of them."""
        dice, sandbox = random.Random(case.seed), self.folder / "sandbox"
        shutil.rmtree(sandbox, ignore_errors=True)
        run, outside, out, printed = (sandbox / name for name in ("run.zarr", "outside", "out", "printed"))
        for folder in (outside, out, printed):
            folder.mkdir(parents=True)
        canaries(outside)
        same = ""
        if case.kind in ("config", "data", "checkpoint"):
            kwargs = {"saved": self.saved} if case.kind == "checkpoint" else {}
            make = {"config": hostile_configs.config, "data": hostile_inputs.data, "checkpoint": hostile_inputs.model}
            case.what, commands, same = make[case.kind](out, self.finished["plain"], dice, **kwargs)
        else:
            copy(self.finished[case.workflow], run)
            case.what = (hostile_runs.MAKERS | hostile_fields.MAKERS)[case.kind](run, outside, dice)
            looking = self._reading(run, out)
            first = [looking[0], looking[2], looking[10]]
            more = [command for command in looking if command not in first]
            watch = Command(("info", run, "--watch", "--interval", 0.01))  # which ends, as nothing is unfinished
            commands = first + ([*more, watch] if case.kind == "injection" else dice.sample(more, 2))
            if dice.random() < 0.6:
                commands += self._writing(case, run, dice)
        but = [run, out, printed]
        before = around(sandbox, but)
        found = watched(commands, out, printed)
        case.wrong += [found.stopped] if found.stopped else []
        case.wrong += changed(before, around(sandbox, but))
        case.commands, case.peak = len(found.said), found.peak
        case.seconds = max((said.seconds for said in found.said), default=0.0)
        case.refused = sum(said.code != 0 for said in found.said)
        if found.peak > BYTES and not found.stopped:
            case.wrong.append(f"{found.peak >> 20} MB were taken")
        for said in found.said:
            case.wrong += [f"{said.command.name}: {words}" for words in self._judge(case, said, same)]
        if case.kind != "hard link":  # whose contents are those of the run's own file
            case.wrong += self._leaks(out, found.said)
        case.wrong += _in_files(out)
        return case

    def _judge(self, case: Case, said: Said, same: str) -> list[str]:
        """Return what is wrong with how a command ended and what it printed."""
        wrong = []
        text = said.err.decode("utf-8", "replace")
        if b"Traceback" in said.err + said.out:
            wrong.append(f"a traceback: {text[-1500:]}")
        elif said.code not in CODES | ({7} if said.command.words[0] == "verify" else set()):
            wrong.append(f"exit {said.code}: {text[-500:]}")
        elif said.code not in (0, 7) and not said.out and "error: " not in text:
            wrong.append(f"exit {said.code} without a message: {text[-300:]}")
        for name, printed in (("stdout", said.out), ("stderr", said.err)):
            try:
                shown = printed.decode("utf-8")
            except UnicodeDecodeError:
                wrong.append(f"{name} is no UTF-8")
                continue
            allowed = "\n\r" if case.kind == "checkpoint" else "\n"  # transformers shows a bar
            first = next((letter for letter in shown if letter not in allowed and not letter.isprintable()), None)
            if first is not None:
                wrong.append(f"{name} has {first!a}: {shown[:300]!a}")
            if any(line.startswith("streamfisher: all is well") for line in shown.split("\n")):
                wrong.append(f"a line of {name} was forged")
        if said.code == 0 and _answers(said.command) and (case.kind != "data" or same):
            other = self._another(case, said, ("data", same) if same else (case.workflow, _question(said.command)))
            wrong += [f"another answer: {other}"] if other else []
        return wrong

    def _another(self, case: Case, said: Said, question: tuple[str, str]) -> str | None:
        """Return how an answer is not what it was before the run was hostile; `None`: it is."""
        expected = self.expected.get(question)
        try:
            content = json.loads(said.out)
        except ValueError as error:
            return f"no JSON ({error})"
        of_manifest = case.kind == "contradiction in the manifest"
        if of_manifest and (question[1] == "density" or re.search(rb'"parameter_subsampling": \d', said.out)):
            return None  # another seed, or columns that are drawn: options of the run, and the answer says so
        return differing(expected, values_of(content)) if expected else None

    def _leaks(self, out: Path, said: Sequence[Said]) -> list[str]:
        """Return where contents of a file outside were shown or written."""
        found = [one.command.name for one in said if SECRET.encode() in one.out + one.err]
        found += [path.name for path in out.rglob("*") if path.is_file() and _small(path) and SECRET in _text(path)]
        return [f"{name} shows what lies outside" for name in found]


def _of_run(work: Workflow, index: int, run: Path) -> Command:
    words = list(work.commands[index])
    words = [*words, "--out", run] if words[0] == "run" else [words[0], run, *words[1:]]
    return Command(tuple(words), pictures=work.pictures)


def _answers(command: Command) -> bool:
    return "--json" in command.words and command.words[0] in ("spectrum", "density", "compare", "run")


def _question(command: Command) -> str:
    return str(command.words[0]) + (" in parts" if "--memory-budget" in command.words else "")


def _small(path: Path) -> bool:
    return path.lstat().st_size < 1 << 26


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


#: The one script of our pages.
_SCRIPT = (resources.files("streamfisher.reports") / "templates" / "page.js").read_text(encoding="utf-8").strip()
_ICON = {"rel": "icon", "href": "data:,"}


class _Page(HTMLParser):
    """Finds what a page of ours never has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_script, self._script = False, ""

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self._script += data

    def handle_endtag(self, tag: str) -> None:
        if self._in_script and self._script.strip() != _SCRIPT:
            self.found.append("<script>")
        self._in_script, self._script = False, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_script = tag == "script" and not attrs
        if self._in_script:
            return
        if tag in ("script", "iframe", "img", "object", "embed", "form") or (tag == "link" and dict(attrs) != _ICON):
            self.found.append(f"<{tag}>")
        self.found += [f"{tag} {name}" for name, value in attrs if name.startswith("on") or "javascript:" in str(value)]


def _in_files(out: Path) -> list[str]:
    """Return what would act in the tables and pages that were written."""
    wrong = []
    for path in sorted(out.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        wrong += [f"{path.name}: the cell {cell[:40]!a}" for cell in cells if _acts(cell)]
    for path in sorted(out.glob("*.html")):
        page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
        wrong += [f"{path.name}: {found}" for found in page.found]
    return wrong


def _acts(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    return False


def table(cases: Sequence[Case]) -> str:
    """Return what came of the cases by kind, as a Markdown table."""
    lines = [
        "| kind | cases | commands | refused | answered | longest command, s | most memory, MB | survived |",
        "|---" * 8 + "|",
    ]
    for kind in [*(kind for kind in KINDS if any(case.kind == kind for case in cases)), "in all"]:
        of_kind = [case for case in cases if kind in (case.kind, "in all")]
        commands, refused = sum(case.commands for case in of_kind), sum(case.refused for case in of_kind)
        most = (f"{max(case.seconds for case in of_kind):.1f}", f"{max(case.peak for case in of_kind) / 1e6:.0f}")
        survived = sum(not case.wrong for case in of_kind)
        words = (kind, len(of_kind), commands, refused, commands - refused, *most, survived)
        lines.append("| " + " | ".join(map(str, words)) + " |")
    return "\n".join(lines)
