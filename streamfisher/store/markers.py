"""Markers: what is finished, and how it is known. Nothing counts as written until its marker exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google_crc32c

from streamfisher.data.batches import Unit
from streamfisher.errors import CorruptRunError, RunError
from streamfisher.runtime.durable import read_json, write_json
from streamfisher.runtime.own_files import read_own
from streamfisher.store.folder import RunFolder
from streamfisher.store.forms import RESULT, UNIT, require_form

#: Bytes of a file of results.
_LARGEST_RESULT = 2 << 30
#: Of so few units each marker is looked at: the folder has some for every parameter too.
_FEW = 64
#: Bytes of markers that are kept once they were read; parsed, a byte takes about five.
_KNOWN_BYTES = 16 << 20


class Markers:
    """Which units are done in which wave, and files of results."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._known: dict[Path, tuple[tuple[int, int, int], Any]] = {}  # version of a marker's file, and its content

    def done_units(self, stage: str = "rows") -> set[int]:
        """Return the indices of the units of `stage` ('rows', 'mean', or `stage_of(wave)`) whose markers exist."""
        if len(self.run.units) <= _FEW:
            paths = {unit.index: self.run.path / "done" / f"{stage}-{unit.index:06d}.json" for unit in self.run.units}
            return {index for index, path in paths.items() if path.is_file()}
        prefix = f"{stage}-"
        names = (path.stem[len(prefix) :] for path in (self.run.path / "done").glob(f"{prefix}*.json"))
        return {int(name) for name in names if len(name) >= 6 and name.isdecimal() and int(name) < len(self.run.units)}

    def is_done(self, unit: Unit, wave: int = 0) -> bool:
        """Return whether one unit has its marker in a wave: one look, where `done_units` lists the folder."""
        return self._path(unit, wave).is_file()

    def todo(self, stage: str = "rows") -> list[Unit]:
        """Return the units of `stage` that are not done yet."""
        done = self.done_units(stage)
        return [unit for unit in self.run.units if unit.index not in done]

    def finished_units(self) -> set[int]:
        """Return the indices of the units that are done in every wave."""
        return set.intersection(*(self.done_units(stage_of(wave)) for wave in range(len(self.run.waves))))

    @property
    def is_collected(self) -> bool:
        """Return whether every unit is done in every wave."""
        return len(self.finished_units()) == len(self.run.units)

    def require_collected(self) -> None:
        """Refuse to go on while units are missing.

        Raises:
            RunError: the run is not fully collected; the message says how far it is.
        """
        for wave in range(len(self.run.waves)):
            todo = self.todo(stage_of(wave))
            if todo:
                done = self.run.n_samples - sum(len(unit) for unit in todo)
                where = f" in wave {wave + 1} of {len(self.run.waves)}" if len(self.run.waves) > 1 else ""
                raise RunError(
                    f"{self.run} is not finished: {done} of {self.run.n_samples} samples have gradients{where}. "
                    "Run the command that made it again; it goes on where it stopped."
                )

    def of_unit(self, unit: Unit, wave: int = 0) -> dict[str, Any]:
        """Return the marker of a finished unit in one wave.

        Raises:
            CorruptRunError: it is damaged, or that of another unit.
        """
        path = self._path(unit, wave)
        marker = self._read(path)
        require_form(marker, UNIT, path)
        if (marker["start"], marker["stop"]) != (unit.start, unit.stop):
            raise CorruptRunError(f"{path} is not the marker of samples {unit.start} to {unit.stop - 1}.")
        if marker.get("wave", wave) != wave:
            raise CorruptRunError(f"{path} is not the marker of wave {wave}.")
        for sample in map(int, marker["skipped"]):
            if not unit.start <= sample < unit.stop:
                raise CorruptRunError(f"{path} is the marker of samples {unit.start} to {unit.stop - 1}, not {sample}.")
        return marker

    def _read(self, path: Path) -> Any:
        """Return a marker, which whoever reads one parameter after the other asks for again and again."""
        try:
            facts = path.stat()
        except OSError:
            return read_json(path, self.run.largest_marker)  # and says what ails it
        version = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        known = self._known.get(path)
        if known is not None and known[0] == version:
            return known[1]
        marker = read_json(path, self.run.largest_marker)
        if sum(size for (_, _, size), _ in self._known.values()) + facts.st_size <= _KNOWN_BYTES:
            self._known[path] = version, marker
        return marker

    def forget_unit(self, unit: Unit, wave: int) -> None:
        """Remove the marker of a unit in one wave."""
        self._path(unit, wave).unlink(missing_ok=True)

    def mark_result(self, path: Path) -> None:
        """Note the checksum of a file of results in the run, so that it can be verified."""
        (self.run.path / "done" / "results").mkdir(exist_ok=True)
        checksum = google_crc32c.value(read_own(path, _LARGEST_RESULT))
        write_json(self.run.path / "done" / "results" / f"{path.name}.json", {"crc32c": checksum})

    def wrong_results(self) -> list[str]:
        """Return the files of results that are missing or not what was written."""
        found = []
        for marker in sorted((self.run.path / "done" / "results").glob("*.json")):
            path = self.run.path / marker.stem
            try:
                content = read_json(marker)
                require_form(content, RESULT, marker)
                right = content["crc32c"] == google_crc32c.value(read_own(path, _LARGEST_RESULT))
            except (OSError, CorruptRunError):
                right = False
            if not right:
                found.append(path.name)
        return found

    def _path(self, unit: Unit, wave: int) -> Path:
        return self.run.path / "done" / f"{stage_of(wave)}-{unit.index:06d}.json"


def stage_of(wave: int) -> str:
    """Return the name of the stage of markers that a wave's units have."""
    return "rows" if wave == 0 else f"rows.{wave}"
