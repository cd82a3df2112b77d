"""Damage to stored files, one at a time: nothing wrong is returned, `verify` names it, and `run` repairs it.

Each case damages one file of a finished run (two, where they are exchanged). Then everything that a run can be asked
for is read: each answer must be refused or be that of the undamaged run. Then `verify` and the commands that made the
run are given, and every byte must be as before.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from campaign.fault_campaign import WORKFLOWS, Workflow
from campaign.workers import copy, files, fork

OPERATIONS = ("flip", "truncate", "zero", "delete", "duplicate", "swap")
_IGNORED = ("lock", "lock.ranks", "log.jsonl")


@dataclass
class Damage:
    """One damaged file, and what came of it."""

    operation: str
    workflow: str
    kind: str  # which part of the run
    path: str
    other: str = ""  # the file that it was exchanged with or overwritten by
    refused: int = 0  # answers that were refused
    named: bool = False  # by verify
    wrong: list[str] = field(default_factory=list)


def kind_of(path: str) -> str:
    """Return which part of a run a file is, in the words of the table."""
    first, _, rest = path.partition("/")
    if path.startswith("done/"):
        name = rest.rsplit("/", 1)[-1]
        return "marker of " + ("eigenvectors" if "eigenvectors" in rest else name.split("-")[0].split(".")[0])
    if first.startswith(("manifest", "config.yaml")):
        return "manifest"
    if path.endswith("zarr.json"):
        return "array metadata"
    return {"gram_mean": "gram", "mean_parts": "mean"}.get(first, first)


def read_everything(run: Path) -> dict[str, str]:
    """Return a digest of every answer that a run gives, or why it is refused, by question."""
    import numpy as np

    from streamfisher import open_run
    from streamfisher.errors import StreamfisherError
    from streamfisher.store import open_eigenvectors

    answers: dict[str, str] = {}

    def ask(question: str, answer: Callable[..., object], *arguments: object) -> None:
        try:
            answers[question] = _digest(answer(*arguments))
        except StreamfisherError as error:
            answers[question] = f"refused: {error}"
        except Exception as error:
            answers[question] = f"ERROR {type(error).__name__}: {error}"

    ask("open", lambda: open_run(run).n_samples)
    if answers["open"].startswith(("refused", "ERROR")):
        return answers
    for structure in ("parameter", "none"):
        for center in (False, True):
            ask(
                f"spectrum {structure} {center}", lambda *how: open_run(run).spectrum(*how).to_dict(), structure, center
            )
    for what in ("loss", "n_targets", "valid", "squared_norm"):
        ask(what, lambda which: open_run(run).store.samples.per_sample(which), what)
    ask("fields", lambda: {name: _digest(values) for name, values in open_run(run).store.samples.fields().items()})
    ask("skipped", lambda: open_run(run).store.samples.skipped())
    for name, size in open_run(run).parameters.items():
        ask(f"rows of {name}", lambda *which: open_run(run).store.rows.columns(*which), name, 0, size)
        ask(f"mean of {name}", lambda *which: open_run(run).store.means.mean(*which), name, 0, size)
    if (run / "eigenvectors").is_dir():

        def eigenvectors() -> list[object]:
            found = open_eigenvectors(run, "global")
            tensors = [np.asarray(tensor) for tensor in found.tensors().values()]
            return [_digest(part) for part in (found.eigenvalues, found.projections(), *tensors)]

        ask("eigenvectors", eigenvectors)
    return answers


def _digest(answer: object) -> str:
    import numpy as np

    if isinstance(answer, np.ndarray):
        content = f"{answer.dtype}{answer.shape}".encode() + answer.tobytes()
    else:
        content = json.dumps(answer, sort_keys=True, default=str).encode()
    return hashlib.sha256(content).hexdigest()


class Campaign:
    """All cases on one folder.

    Args:
        folder: for the runs.
        workflows: that made them.
    """

    def __init__(self, folder: Path, workflows: Sequence[Workflow]):
        self.folder = folder
        self.workflows = {workflow.name: workflow for workflow in workflows}
        self.finished: dict[str, Path] = {}
        self.answers: dict[str, dict[str, str]] = {}
        for workflow in workflows:
            run = folder / "run.zarr"
            shutil.rmtree(run, ignore_errors=True)
            for index in range(len(workflow.commands)):
                done = fork(workflow.command(index, run), folder / "printed")
                assert done.code == 0, done.printed
            self.answers[workflow.name] = self._answers(run)
            bad = [answer for answer in self.answers[workflow.name].values() if answer.startswith("ERROR")]
            assert not bad, bad
            self.finished[workflow.name] = folder / f"{workflow.name.replace(' ', '_')}.finished"
            copy(run, self.finished[workflow.name])

    def _answers(self, run: Path) -> dict[str, str]:
        target = self.folder / "answers.json"

        def command() -> int:
            target.write_text(json.dumps(read_everything(run)))
            return 0

        done = fork(command, self.folder / "printed")
        assert done.code == 0, done.printed
        return json.loads(target.read_text())

    def draw(self, count: int, seed: int) -> list[Damage]:
        """Return cases: operations in turn, the parts of a run in turn, files of a part at random."""
        generator = random.Random(seed)
        cases = []
        for number in range(count):
            workflow = list(self.workflows)[number % len(self.workflows)]
            run = self.finished[workflow]
            by_kind: dict[str, list[str]] = {}
            for path in sorted(run.rglob("*")):
                name = str(path.relative_to(run))
                if path.is_file() and name not in _IGNORED and not name.endswith((".png", ".html")):
                    by_kind.setdefault(kind_of(name), []).append(name)
            kinds = sorted(by_kind)
            kind = kinds[(number // len(self.workflows)) % len(kinds)]
            case = Damage(generator.choice(OPERATIONS), workflow, kind, generator.choice(by_kind[kind]))
            others = [name for name in by_kind[kind] if name != case.path]
            if not others or generator.random() < 0.2:
                others = [name for names in by_kind.values() for name in names if name != case.path]
            if case.operation in ("duplicate", "swap"):
                case.other = generator.choice(others)
            cases.append(case)
        return cases

    def run(self, case: Damage, seed: int) -> Damage:
        """Damage, read, verify, give the commands again, compare."""
        run = self.folder / "run.zarr"
        copy(self.finished[case.workflow], run)
        damage(run, case, random.Random(seed))
        look = self.folder / "look.zarr"
        copy(run, look)
        for question, answer in self._answers(look).items():
            if answer.startswith("refused"):
                case.refused += not self.answers[case.workflow][question].startswith("refused")
            elif answer.startswith("ERROR"):
                case.wrong.append(f"{question}: {answer}")
            elif answer != self.answers[case.workflow][question]:
                case.wrong.append(f"{question}: another answer")
        from campaign.workers import streamfisher

        checked = fork(streamfisher(("verify", run, "--repair", "--quiet")), self.folder / "printed")
        case.named = checked.code == 4
        if checked.code not in (0, 4, 7) or "Traceback" in checked.printed:
            case.wrong.append(f"verify ended with {checked.words}: {checked.printed[-800:]}")
        workflow = self.workflows[case.workflow]
        for index in range(len(workflow.commands)):
            again = fork(workflow.command(index, run), self.folder / "printed")
            if again.code != 0:
                case.wrong.append(f"command {index} after verify ended with {again.words}: {again.printed[-800:]}")
                return case
        expected, found = everything(self.finished[case.workflow]), everything(run)
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if differing:
            case.wrong.append(f"after verify and run, {differing[0]} differs ({len(differing)} files)")
        clean = fork(streamfisher(("verify", run, "--quiet")), self.folder / "printed")
        if clean.code != 0:
            case.wrong.append(f"verify still finds: {clean.printed[-500:]}")
        shutil.rmtree(look)
        return case


def everything(run: Path) -> dict[str, bytes]:
    """Return all files that must be as before."""
    return files(run, ("manifest.json", "manifest.copy.json", "done"))


def damage(run: Path, case: Damage, generator: random.Random) -> None:
    """Do to a file what the case says."""
    path, content = run / case.path, bytearray((run / case.path).read_bytes())
    if case.operation == "flip":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
    elif case.operation == "truncate":
        path.write_bytes(content[: generator.randrange(len(content))])
    elif case.operation == "zero":
        start = generator.randrange(len(content))
        stop = generator.randint(start + 1, len(content))
        path.write_bytes(content[:start] + bytes(stop - start) + content[stop:])
    elif case.operation == "delete":
        path.unlink()
    elif case.operation == "duplicate":
        path.write_bytes((run / case.other).read_bytes())
    else:
        other = (run / case.other).read_bytes()
        (run / case.other).write_bytes(content)
        path.write_bytes(other)


def table(cases: Sequence[Damage]) -> str:
    """Return counts by part and operation as a Markdown table."""
    lines = [
        "| part | " + " | ".join(OPERATIONS) + " | in all | refused when read | named by `verify` | survived |",
        "|---" * (len(OPERATIONS) + 5) + "|",
    ]
    for kind in [*sorted({case.kind for case in cases}), "in all"]:
        of_kind = [case for case in cases if kind in (case.kind, "in all")]
        counts = [sum(case.operation == operation for case in of_kind) for operation in OPERATIONS]
        counts += [len(of_kind), sum(case.refused > 0 for case in of_kind), sum(case.named for case in of_kind)]
        counts.append(sum(not case.wrong for case in of_kind))
        lines.append(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


DAMAGED = tuple(
    workflow
    for workflow in WORKFLOWS
    if workflow.name in ("plain", "centered rows", "factors", "waves", "waves of factors")
)
