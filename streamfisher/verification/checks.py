"""One check for each kind of thing that a run holds: what is wrong with it, and how the next `run` comes to mend it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from streamfisher.analysis.run import StoredRun
from streamfisher.data.batches import Unit
from streamfisher.errors import CorruptRunError
from streamfisher.runtime.bars import Bar
from streamfisher.runtime.durable import read_json
from streamfisher.runtime.own_files import remove_tree
from streamfisher.store import codecs, stage_of
from streamfisher.store.config_file import CONFIG_FILE, is_right, write_config
from streamfisher.store.eigenvectors import read_marker
from streamfisher.store.factors import checksum_of
from streamfisher.store.forms import EIGENVECTORS, require_form
from streamfisher.store.integrity import chunk_digest
from streamfisher.store.names import node_name
from streamfisher.store.opening import open_array
from streamfisher.store.repair import restore_metadata, wrong_metadata
from streamfisher.store.texts import TEXT_FILE
from streamfisher.verification.problem import Problem


class Check(Protocol):
    """Looks at one kind of thing in a run."""

    def find(self) -> list[Problem]:
        """Return what is wrong."""

    def repair(self) -> None:
        """Remove or restore what `find` came upon, so that the next `run` makes it again; the run is locked."""


class MetadataCheck:
    """Zarr's own metadata of every array: as the manifest has it."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self._wrong: list[Any] = []

    def find(self) -> list[Problem]:
        """Return the arrays whose metadata are otherwise."""
        self._wrong = list(wrong_metadata(self.run.path, self.run.manifest))
        return [Problem("metadata", None, None, None, f"{name} is not as the manifest has it") for name in self._wrong]

    def repair(self) -> None:
        """Write them anew."""
        restore_metadata(self.run.path, self.run.manifest, self._wrong)


class ConfigCheck:
    """`config.yaml`: as it follows from the manifest; older runs have none."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self._wrong = False

    def find(self) -> list[Problem]:
        """Return whether it says something else."""
        there = (self.run.path / CONFIG_FILE).exists()
        self._wrong = there and not is_right(self.run.path, self.run.manifest)
        return [Problem("config", None, None, None, f"{CONFIG_FILE} is not what was written")] if self._wrong else []

    def repair(self) -> None:
        """Write it anew."""
        if self._wrong:
            write_config(self.run.path, self.run.manifest)


class TextCheck:
    """`texts.json`: what it was written as; few runs have one."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self._wrong = False

    def find(self) -> list[Problem]:
        """Return whether it was altered."""
        try:
            _ = self.run.texts
        except CorruptRunError as error:
            self._wrong = True
            return [Problem("texts", None, None, None, str(error))]
        return []

    def repair(self) -> None:
        """Delete it, so that the next `run` with --store-text writes it."""
        if self._wrong:
            (self.run.path / TEXT_FILE).unlink(missing_ok=True)


class UnitCheck:
    """Rows, factors and values per sample of every finished unit, in every wave: what its marker says."""

    def __init__(self, run: StoredRun, *, progress: bool = False) -> None:
        self.run, self.progress = run, progress
        self._damaged: list[tuple[Unit, int]] = []  # units, and the waves they are damaged in

    def find(self) -> list[Problem]:
        """Return what is damaged, by unit and parameter."""
        store, problems = self.run.store, []
        done = {wave: store.markers.done_units(stage_of(wave)) for wave in range(len(store.waves))}
        work = [(unit, wave) for wave in done for unit in store.units if unit.index in done[wave]]
        for unit, wave in Bar(work, desc="verify", unit="unit", disable=not self.progress):
            wrong = _check_unit(self.run, unit, wave)
            if wrong:
                problems += wrong
                self._damaged.append((unit, wave))
        return problems

    def repair(self) -> None:
        """Forget these units; Grams that were made of them before they were damaged stay, if they are whole."""
        for unit, wave in self._damaged:
            self.run.store.forget_unit(unit, wave)


def forget_units(run: StoredRun, units: Iterable[tuple[Unit, int]]) -> None:
    """Remove the markers of units in some waves, and of the Grams that were made of what is still stored of them."""
    store, names = run.store, []
    for unit, wave in units:
        store.forget_unit(unit, wave)
        names += [name for name in store.waves[wave] if not store.kept.is_deleted(name)]
    for key in store.grams.keys_of(names):
        store.grams.forget(key)


class GramCheck:
    """Grams and second moments: what their markers say."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self._damaged: list[str] = []

    def find(self) -> list[Problem]:
        """Return the Grams that are damaged."""
        problems, store, valid = [], self.run.store, self._valid()
        for key in filter(store.grams.has, store.gram_members):
            try:
                store.grams.check(key)
                moment = store.grams.moment(key)
                if moment is not None and valid not in (None, moment.count):
                    raise CorruptRunError(f"the moment of {key} is of {moment.count} samples, not of the valid ones.")
            except CorruptRunError as error:
                problems.append(Problem("gram", key, None, None, str(error)))
                self._damaged.append(key)
        return problems

    def _valid(self) -> int | None:
        """Return how many samples count; `None` where not all units are finished and whole."""
        store = self.run.store
        try:
            return store.n_samples - len(store.samples.skipped()) if store.markers.is_collected else None
        except CorruptRunError:
            return None

    def repair(self) -> None:
        """Forget them."""
        for key in self._damaged:
            self.run.store.grams.forget(key)


class MeanCheck:
    """The mean that was subtracted, and the sums of units that it was made of."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self._wrong = False
        self._parts: list[Path] = []  # markers of units whose sums are damaged

    def find(self) -> list[Problem]:
        """Return what is wrong with the mean, and with the sums of each unit."""
        store, done = self.run.store, self.run.path / "done"
        problems: list[Problem] = []
        if not store.centered:
            return problems
        added_up = (done / "mean.json").is_file()
        if added_up:
            for name in self.run.parameters:
                try:
                    store.means.check(name)
                except CorruptRunError as error:
                    problems.append(Problem("mean", name, None, None, str(error)))
        for unit in store.units:
            marker = done / f"mean-{unit.index:06d}.json"
            if not marker.is_file():
                if added_up:
                    problems.append(Problem("mean_parts", None, unit.start, unit.stop - 1, "their marker is missing"))
                continue
            for name, detail in store.means.wrong_parts(unit).items():
                problems.append(Problem("mean_parts", name, unit.start, unit.stop - 1, detail))
                self._parts.append(marker)
        self._wrong = bool(problems)
        return problems

    def repair(self) -> None:
        """Let the damaged sums be made again, and the mean be added up again."""
        for marker in self._parts:
            marker.unlink(missing_ok=True)
        if self._wrong:
            (self.run.path / "done" / "mean.json").unlink(missing_ok=True)


class FieldCheck:
    """Scalars of the samples that came with the data."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self._wrong = False
        self._damaged: list[Path] = []

    def find(self) -> list[Problem]:
        """Return the fields that are damaged."""
        problems = []
        for folder in sorted((self.run.path / "fields").glob("*")):
            if folder.name == "zarr.json":
                continue
            try:
                self.run.store.samples.read_field(folder)
            except CorruptRunError as error:
                problems.append(Problem("field", folder.name, None, None, str(error)))
                self._damaged.append(folder)
        try:
            missing = self.run.store.samples.missing_fields()
            problems += [Problem("field", name, None, None, "missing; the next `run` writes it") for name in missing]
        except CorruptRunError as error:
            problems.append(Problem("field", None, None, None, str(error)))
        self._wrong = bool(problems)
        return problems

    def repair(self) -> None:
        """Remove them, and the marker; the next `run` writes them from the data."""
        for folder in self._damaged:
            remove_tree(self.run.path, folder)
        if self._wrong:
            (self.run.path / "done" / "fields.json").unlink(missing_ok=True)


class EigenvectorCheck:
    """Eigenvectors in parameter space, and their markers."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self._damaged: list[str] = []

    def find(self) -> list[Problem]:
        """Return the sets of eigenvectors that are damaged."""
        problems = []
        for marks in sorted((self.run.path / "done" / "eigenvectors").glob("*")):
            detail = _wrong_eigenvectors(marks, self.run.path / "eigenvectors" / marks.name)
            if detail is not None:
                problems.append(Problem("eigenvectors", marks.name, None, None, detail))
                self._damaged.append(marks.name)
        return problems

    def repair(self) -> None:
        """Remove them, markers included."""
        for folder in self._damaged:
            remove_tree(self.run.path, self.run.path / "done" / "eigenvectors" / folder)
            remove_tree(self.run.path, self.run.path / "eigenvectors" / folder)


class ResultCheck:
    """Files of results: spectra, tables, pictures, pages."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self._wrong: list[str] = []

    def find(self) -> list[Problem]:
        """Return the files that are not what was written."""
        self._wrong = self.run.store.markers.wrong_results()
        return [Problem("result", None, None, None, f"{name} is not what was written") for name in self._wrong]

    def repair(self) -> None:
        """Remove them and their markers."""
        for name in self._wrong:
            (self.run.path / name).unlink(missing_ok=True)
            (self.run.path / "done" / "results" / f"{name}.json").unlink(missing_ok=True)


class SpectrumCheck:
    """Spectra that were kept; they are read for answers only where they are whole."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self._damaged: list[Path] = []

    def find(self) -> list[Problem]:
        """Return the kept spectra that are not what was written."""
        self._damaged = self.run.store.spectra.damaged()
        return [Problem("spectrum", None, None, None, f"{p.name} is not what was written") for p in self._damaged]

    def repair(self) -> None:
        """Remove them; they are solved again when they are asked for."""
        for path in self._damaged:
            path.unlink(missing_ok=True)


class NamedArrayCheck:
    """Arrays that are there for other programs; no answer is made of them."""

    def __init__(self, run: StoredRun) -> None:
        self.run = run
        self._damaged: list[str] = []

    def find(self) -> list[Problem]:
        """Return the arrays and groups that are not what was written."""
        self._damaged = self.run.store.named.damaged()
        return [Problem("named", None, None, None, f"{where} is not what was written") for where in self._damaged]

    def repair(self) -> None:
        """Remove them; the next report writes them."""
        if self._damaged:
            self.run.store.named.repair()


def _wrong_eigenvectors(marks: Path, folder: Path) -> str | None:
    """Return what is wrong with one set of eigenvectors; `None`: nothing."""
    try:
        finished = read_json(marks / "finished.json") if (marks / "finished.json").is_file() else {}
        identity = read_json(marks / "identity.json")
        require_form(identity, EIGENVECTORS, marks / "identity.json")
        names = {marker.stem for marker in marks.glob("*.json")} - {"identity"}
        if finished:
            names |= {"solved", *(f"parameter-{node_name(name)}" for name in identity["parameters"])}
        for name in sorted(names):
            read_marker(marks, name)
        if finished.get("files") not in (None, chunk_digest(folder)):
            return "not what was written"
    except (CorruptRunError, AttributeError, TypeError) as error:
        return str(error)
    if not finished:
        return None
    try:
        for metadata in folder.rglob("zarr.json"):
            if read_json(metadata).get("node_type") == "array":  # a chunk's width of the last axis at a time
                node = open_array(metadata.parent)
                width = node.chunks[-1]
                for start in range(0, node.shape[-1], width):
                    node[..., start : start + width]
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        return f"cannot be read ({error})"
    return None


def _check_unit(run: StoredRun, unit: Unit, wave: int) -> list[Problem]:
    last = unit.stop - 1
    store = run.store
    try:
        marker: dict[str, Any] = store.markers.of_unit(unit, wave)
        checksums = marker["crc32c"]
    except (CorruptRunError, KeyError, TypeError) as error:
        return [Problem("marker", None, unit.start, last, str(error))]
    problems = []
    here = [name for name in store.waves[wave] if not store.kept.is_deleted(name)]
    for name in here:
        if store.rows.representation(name) != "dense":
            continue
        try:
            stored = store.rows.read_unit(name, unit)
        except (ValueError, RuntimeError, OSError, CorruptRunError) as error:
            problems.append(Problem("rows", name, unit.start, last, f"cannot be read ({error})"))
            continue
        if codecs.checksum(stored) != checksums.get(name):
            problems.append(Problem("rows", name, unit.start, last, "not what was written"))
    problems += _check_factors(run, unit, wave, [name for name in here if store.rows.representation(name) == "factors"])
    return problems + _check_samples(run, unit, wave)


def _check_factors(run: StoredRun, unit: Unit, wave: int, names: Sequence[str]) -> list[Problem]:
    """Check the factors of a unit, each tensor once; a shared one is named after the first parameter it is part of."""
    problems: list[Problem] = []
    seen: set[str] = set()
    for name in names:
        try:
            tensors = run.store.factors.checksums(unit, wave, name)
        except CorruptRunError as error:
            return [*problems, Problem("marker", name, unit.start, unit.stop - 1, str(error))]
        for side, expected in tensors:
            if str(side.path) in seen:
                continue
            seen.add(str(side.path))
            try:
                if checksum_of(side) == expected:
                    continue
                detail = "not what was written"
            except CorruptRunError as error:
                detail = str(error)
            problems.append(Problem("factors", name, unit.start, unit.stop - 1, detail))
    return problems


def _check_samples(run: StoredRun, unit: Unit, wave: int) -> list[Problem]:
    """Check what was seen per sample against the unit's marker; missing chunks read as fill values."""
    store = run.store
    problems: list[Problem] = []
    waves = [other for other in range(len(store.waves)) if store.markers.is_done(unit, other)]
    for what in ("valid", "n_targets", "squared_norm", "loss"):
        try:
            values = store.samples.read_unit(what, unit)
            unwritten = values > 1 if what == "valid" else values < 0 if what == "n_targets" else np.zeros(1, bool)
            if unwritten.any():
                raise CorruptRunError("a chunk is missing")
            store.samples.check(what, unit, values, waves if what != "squared_norm" else [wave])
        except (ValueError, RuntimeError, OSError) as error:
            detail = str(error) if isinstance(error, CorruptRunError) else f"cannot be read ({error})"
            problems.append(Problem(what, None, unit.start, unit.stop - 1, detail))
    return problems
