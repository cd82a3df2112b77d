"""Faults at every stage of a run, one at a time; after each the same command must end with the same bytes.

Each case starts from an undisturbed run as it was before one of its commands, strikes that command once, looks at what
is left, and gives the same command again. Seeded: the same seed gives the same cases.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from campaign import faults
from campaign.faults import Disk, Watch
from campaign.workers import Ending, copy, difference, files, fork, streamfisher

MODEL, DATA = "tiny_models:regression", "campaign.models:vectors"
_RUN = ("run", MODEL, DATA, "--chunk-size", 2, "--blocks", "parameter,none", "--center", "both")
_RUN += ("--deterministic", "--workers", 1, "--device", "cpu", "--quiet")


@dataclass(frozen=True)
class Workflow:
    """Commands given one after the other; the run's folder is added to each."""

    name: str
    commands: tuple[tuple[object, ...], ...]
    pictures: bool = False

    def command(self, index: int, run: Path) -> Callable[[], int]:
        """Return a command on `run`."""
        arguments = list(self.commands[index])
        arguments = [*arguments, "--out", run] if arguments[0] == "run" else [arguments[0], run, *arguments[1:]]
        return streamfisher(arguments, pictures=self.pictures)

    def grows(self, index: int) -> bool:
        """Return whether a command adds samples."""
        return self.name.startswith("growing") and index > 0


_EIGENVECTORS = ("eigenvectors", "--block", "global", "--top", 2, "--blocks", "none", "--quiet")
WORKFLOWS = (
    Workflow("plain", (_RUN, _EIGENVECTORS)),
    Workflow("centered rows", ((*_RUN, "--store-centered"), _EIGENVECTORS)),
    Workflow("growing", ((*_RUN, "--samples", 5), _RUN)),
    Workflow("factors", ((*_RUN, "--representation", "factors"), _EIGENVECTORS)),
    Workflow("waves", ((*_RUN, "--representation", "dense", "--hold", "disk", "--disk-budget", "3kB"),)),
    Workflow("held in memory", ((*_RUN, "--keep-gradients", "none", "--hold", "host"),)),
    Workflow("waves of factors", ((*_RUN, "--representation", "factors", "--hold", "disk", "--disk-budget", "2500B"),)),
    Workflow("reported", (_RUN, ("report", "--quiet")), pictures=True),
)

#: Kinds of faults: how many of 100 cases, and what a command may end with.
KINDS = {
    "SIGKILL": 14,
    "SIGKILL at a random time": 8,
    "SIGTERM": 6,
    "SIGINT": 6,
    "SIGUSR1": 4,
    "exception in the model": 6,
    "no more memory": 10,
    "full disk": 10,
    "read-only disk": 8,
    "vanished disk": 8,
    "fsync error": 8,
    "I/O error": 8,
    "lasting I/O error": 4,
}
_SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGUSR1": signal.SIGUSR1}
_ENDINGS = {
    "SIGKILL": {-9},
    "SIGKILL at a random time": {-9, 0},
    "SIGTERM": {143, 0},
    "SIGINT": {130, 0},
    "SIGUSR1": {138, 0},
    "exception in the model": {0, 1, 2},  # 0: the probe tries another way to call it
    # 1, SIGABRT, SIGSEGV: native code gave up; SIGKILL: a thread could not start and the process never ended
    "no more memory": {5, 0, 1, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL},
}
_OTHER_ENDINGS = {0, 2, 4, 5}


@dataclass
class Case:
    """One fault, and what came of it."""

    kind: str
    workflow: str
    command: int
    stage: str
    position: int
    ended: str = ""  # how the command that was struck ended
    wrong: list[str] = field(default_factory=list)  # empty: survived


@dataclass
class Reference:
    """An undisturbed run: its state before each command and at the end, and the events of each stage."""

    states: list[Path]
    expected: dict[str, bytes]
    events: list[dict[str, dict[str, int]]]  # per command: which events count -> stage -> how many
    seconds: list[float]
    spectrum: bytes | None


_ONLY: dict[str, frozenset[str] | None] = {
    "any": None,
    "fsync error": frozenset({"fsync"}),
    "I/O error": frozenset({"write", "read", "os.rename", "os.link", "os.remove", "os.mkdir"}),
    "exception in the model": frozenset({"forward"}),
    "on disk": frozenset({"write", "os.rename", "os.link", "os.mkdir", "fsync"}),
}
_COUNTED_AS = {"lasting I/O error": "I/O error", "full disk": "on disk", "read-only disk": "on disk"}


def _only(kind: str) -> str:
    kind = _COUNTED_AS.get(kind, kind)
    return kind if kind in _ONLY else "any"


class Campaign:
    """All cases on one folder.

    Args:
        folder: for the runs; emptied.
        disk: a mounted filesystem for faults of the disk; `None`: they are injected as errors of single operations.
        workflows: which.
    """

    def __init__(self, folder: Path, disk: Disk | None, workflows: Sequence[Workflow] = WORKFLOWS):
        self.folder, self.disk = folder, disk
        self.runs = disk.seen if disk else folder / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.workflows = {workflow.name: workflow for workflow in workflows}
        self.references = {name: self._reference(workflow) for name, workflow in self.workflows.items()}

    def _reference(self, workflow: Workflow) -> Reference:
        run = self.runs / "run.zarr"
        states, events, seconds = [], [], []
        for index in range(len(workflow.commands)):
            state = self.folder / f"{workflow.name.replace(' ', '_')}.{index}"
            copy(run, state)
            states.append(state)
            watch = Watch(run, growing=workflow.grows(index))
            start = time.monotonic()
            events.append(self._events(workflow.command(index, run), watch))
            seconds.append(time.monotonic() - start)
        expected = files(run)
        spectrum = None
        if any(command[0] == "run" for command in workflow.commands):
            spectrum = self._spectrum(run)
            assert spectrum is not None
        shutil.rmtree(run)
        return Reference(states, expected, events, seconds, spectrum)

    def _events(self, command: Callable[[], int], watch: Watch) -> dict[str, dict[str, int]]:
        """Run a command undisturbed and return how many events there were, by the set that counts and the stage."""
        found = self.folder / "events.json"

        def counting() -> int:
            code = command()
            found.write_text(json.dumps([[*key, count] for key, count in watch.seen.items()]))
            return code

        done = fork(counting, self.folder / "printed", before=watch.install)
        assert done.code == 0, done.printed
        counts: dict[str, dict[str, int]] = {which: {} for which in _ONLY}
        for stage, name, count in json.loads(found.read_text()):
            for which, only in _ONLY.items():
                if only is None or name in only:
                    counts[which][stage] = counts[which].get(stage, 0) + count
        return counts

    def _spectrum(self, run: Path) -> bytes | None:
        """Return what `streamfisher spectrum` says of a run, or `None` where it refuses."""
        target = self.folder / "spectrum.json"
        target.unlink(missing_ok=True)
        arguments = ("spectrum", run, "--blocks", "parameter,none", "--center", "both", "--quiet", "--out", target)
        done = fork(streamfisher(arguments), self.folder / "printed")
        if done.code == 0:
            return target.read_bytes()
        assert "Traceback" not in done.printed, done.printed
        return None

    def draw(self, count: int, seed: int) -> list[Case]:
        """Return cases: kinds in their shares, and for each a stage that it can strike, all stages equally often."""
        generator = random.Random(seed)
        kinds = [kind for kind, share in KINDS.items() for _ in range(max(1, round(share * count / 100)))]
        generator.shuffle(kinds)
        cases = []
        for number, kind in enumerate(kinds):
            places: dict[str, list[tuple[str, int, int]]] = {}
            for name, reference in self.references.items():
                for index, counts in enumerate(reference.events):
                    for stage, events in counts[_only(kind)].items():
                        places.setdefault(stage, []).append((name, index, events))
            stages = sorted(places)
            stage = stages[number % len(stages)]
            name, index, events = generator.choice(places[stage])
            cases.append(Case(kind, name, index, stage, generator.randrange(events)))
        return cases

    def run(self, case: Case) -> Case:
        """Strike, look, give the command again, compare."""
        workflow, reference = self.workflows[case.workflow], self.references[case.workflow]
        run = self.runs / "run.zarr"
        copy(reference.states[case.command], run)
        kill_after = None
        if case.kind == "SIGKILL at a random time":
            span = reference.seconds[case.command]
            kill_after = span * random.Random(case.position).random()
            watch = None
        else:
            watch = Watch(
                run,
                growing=workflow.grows(case.command),
                stage=case.stage,
                position=case.position,
                strike=self._strike(case.kind, run),
                only=_ONLY[_only(case.kind)],
            )
        command = workflow.command(case.command, run)
        try:
            done = fork(
                command,
                self.folder / "printed",
                before=watch.install if watch else lambda: None,
                kill_after=kill_after,
                patience=30.0 if case.kind == "no more memory" else None,
            )
        finally:
            self._mend(run)
        case.ended = done.words
        self._judge(case, done)
        if done.code == 0 and case.command == len(workflow.commands) - 1:
            changed = difference(reference.expected, run)
            if changed:
                case.wrong.append(f"the command ended well and {changed}")
        elif case.position % 3 == 0 and (run / "manifest.json").is_file():
            self._look(case, reference, run)
        for index in range(case.command, len(workflow.commands)):
            again = fork(workflow.command(index, run), self.folder / "printed")
            if again.code != 0:
                case.wrong.append(f"the same command again ended with {again.words}: {again.printed[-800:]}")
                return case
        changed = difference(reference.expected, run)
        if changed:
            case.wrong.append(f"after the same command again, {changed}")
        shutil.rmtree(run)
        return case

    def _judge(self, case: Case, done: Ending) -> None:
        allowed = _ENDINGS.get(case.kind, _OTHER_ENDINGS)
        if done.code not in allowed:
            case.wrong.append(f"the command ended with {done.words}: {done.printed[-1500:]}")
        elif case.kind == "no more memory" and done.code == 1 and "OpenBLAS error" in done.printed:
            return  # it ends the process by itself
        elif case.kind != "exception in the model" and "Traceback" in done.printed:
            case.wrong.append(f"a traceback: {done.printed[-1500:]}")
        elif done.code > 0 and "streamfisher: " not in done.printed and case.kind != "exception in the model":
            case.wrong.append(f"{done.words} without a message: {done.printed[-300:]}")

    def _look(self, case: Case, reference: Reference, run: Path) -> None:
        """An analysis of what is left is refused, or right."""
        look = run.with_name("look.zarr")
        copy(run, look)
        found = self._spectrum(look)
        if found is not None and found != reference.spectrum and not self._earlier(case, found):
            case.wrong.append("an analysis of what was left gave another spectrum")
        shutil.rmtree(look)

    def _earlier(self, case: Case, found: bytes) -> bool:
        """Return whether a run that was to grow is the complete run that it was before."""
        workflow = self.workflows[case.workflow]
        if not workflow.grows(len(workflow.commands) - 1):
            return False
        look = self.runs / "earlier.zarr"
        copy(self.references[case.workflow].states[-1], look)
        before = self._spectrum(look)
        shutil.rmtree(look)
        return before == found

    def _strike(self, kind: str, run: Path) -> Callable[[str, str], None]:
        if kind in _SIGNALS:
            return faults.send(_SIGNALS[kind])
        if kind == "exception in the model":
            return faults.exception
        if kind == "no more memory":
            return faults.no_more_memory
        if kind == "fsync error":
            return faults.error(faults.BROKEN)
        if kind in ("I/O error", "lasting I/O error"):
            return faults.error(faults.BROKEN, lasting=kind.startswith("lasting"))
        if self.disk is None:
            if kind == "vanished disk":
                return faults.vanish(run)
            number = faults.NO_SPACE if kind == "full disk" else faults.READ_ONLY
            return faults.error(number, lasting=True, writes_only=True)
        change = {"full disk": self.disk.fill, "read-only disk": self.disk.forbid, "vanished disk": self.disk.hide}[
            kind
        ]
        return lambda name, path: change()

    def _mend(self, run: Path) -> None:
        """Give back a disk with room on which one may write."""
        if self.disk is not None:
            self.disk.hide()
            for left in self.disk.seen.iterdir():  # what was written where the disk had been
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            self.disk.show()
            self.disk.empty()
            return
        vanished = run.with_name(run.name + ".vanished")
        if vanished.exists():
            shutil.rmtree(run, ignore_errors=True)
            vanished.rename(run)


def table(cases: Sequence[Case]) -> str:
    """Return counts by kind and stage as a Markdown table."""
    stages = [stage for stage in faults.STAGES if any(case.stage == stage for case in cases)]
    lines = ["| fault | " + " | ".join(stages) + " | in all | survived |", "|---" * (len(stages) + 3) + "|"]
    kinds = {case.kind for case in cases}
    for kind in [*sorted(kinds), "in all"]:
        of_kind = [case for case in cases if kind in (case.kind, "in all")]
        counts = [str(sum(case.stage == stage for case in of_kind)) for stage in stages]
        survived = sum(not case.wrong for case in of_kind)
        lines.append(f"| {kind} | " + " | ".join(counts) + f" | {len(of_kind)} | {survived} |")
    return "\n".join(lines)
