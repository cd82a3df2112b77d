"""Is a stored run what was written? Every chunk is read and held against the checksums of its marker."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from torch import Tensor, nn
from tqdm import tqdm

from streamfisher.analysis.run import StoredRun
from streamfisher.data.batches import Unit
from streamfisher.errors import ConfigError, CorruptRunError
from streamfisher.runtime.durable import read_json
from streamfisher.store import RunLock, codecs, stage_of
from streamfisher.store.factors import checksum_of
from streamfisher.store.integrity import chunk_digest
from streamfisher.store.layout import MANIFEST_COPY
from streamfisher.store.names import node_name
from streamfisher.store.repair import restore_manifest, restore_metadata, wrong_metadata
from streamfisher.verification.problem import Problem


def verify(
    run: StoredRun,
    *,
    repair: bool = True,
    progress: bool = False,
    deep: int | None = None,
    model: nn.Module | None = None,
    samples: Any = None,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    seed: int = 0,
) -> list[Problem]:
    """Read every finished unit and Gram and compare checksums.

    Args:
        run: to check.
        repair: remove the markers of what is damaged, so that the next `run` computes it again.
        progress: show a bar.
        deep: of so many random samples, compute the gradients again and compare, once all checksums are right.
        model: for `deep`, the one that the run was made with, on its device.
        samples: for `deep`, those that the run was made with.
        loss: for `deep`, the one that `collect` was given.
        seed: of the choice of samples.

    Returns:
        What is wrong; empty where everything that is marked as finished is intact.

    Raises:
        RunError: `repair` is asked for while another process writes the run; or, for `deep`, nothing is finished.
        ConfigError: `deep` is asked for without a model and samples, or of less than one sample.
        RunMismatchError: for `deep`, model, data or loss are not those of the run.
    """
    if deep is not None and (model is None or samples is None):
        raise ConfigError(f"deep={deep} computes gradients again, which takes model= and samples=.")
    store = run.store
    metadata = wrong_metadata(run.path, run.manifest)
    problems = [Problem("metadata", None, None, None, f"{name} is not as the manifest has it") for name in metadata]
    if metadata and repair:
        with RunLock(run.path):
            restore_metadata(run.path, run.manifest, metadata)
    damaged: list[tuple[Unit, int]] = []  # units, and the waves they are damaged in
    done = {wave: store.markers.done_units(stage_of(wave)) for wave in range(len(store.waves))}
    work = [(unit, wave) for wave in done for unit in store.units if unit.index in done[wave]]
    for unit, wave in tqdm(work, desc="verify", unit="unit", disable=not progress):
        found = _check_unit(run, unit, wave)
        if found:
            problems += found
            damaged.append((unit, wave))
    damaged_grams = []
    for key in filter(store.grams.has, store.gram_members):
        try:
            store.grams.check(key)
        except CorruptRunError as error:
            problems.append(Problem("gram", key, None, None, str(error)))
            damaged_grams.append(key)
    mean, parts = _check_mean(run)
    fields = _check_fields(run)
    eigenvectors = _check_eigenvectors(run)
    results = store.markers.wrong_results()
    problems += [*mean, *(problem for _, problem in parts), *(problem for _, problem in fields)]
    problems += [problem for _, problem in eigenvectors]
    problems += [Problem("result", None, None, None, f"{name} is not what was written") for name in results]
    if deep is not None and not problems:
        from streamfisher.verification.recompute import deep_problems  # the one place where verifying takes a model

        problems = deep_problems(run, model, samples, count=deep, loss=loss, seed=seed)
        damaged, damaged_grams = _to_compute_again(run, problems)
    if repair and problems:
        with RunLock(run.path):
            for unit, wave in damaged:
                store.forget_unit(unit, wave)
            of_damaged = [name for _, wave in damaged for name in store.waves[wave] if not store.kept.is_deleted(name)]
            for key in {*damaged_grams, *store.grams.keys_of(of_damaged)}:
                store.grams.forget(key)
            for marker, _ in parts:
                marker.unlink(missing_ok=True)
            if mean or parts:
                (run.path / "done" / "mean.json").unlink(missing_ok=True)
            for folder, _ in fields:
                shutil.rmtree(folder, ignore_errors=True)
            for folder, _ in eigenvectors:
                shutil.rmtree(run.path / "done" / "eigenvectors" / folder, ignore_errors=True)
                shutil.rmtree(run.path / "eigenvectors" / folder, ignore_errors=True)
            for name in results:
                (run.path / name).unlink(missing_ok=True)
                (run.path / "done" / "results" / f"{name}.json").unlink(missing_ok=True)
    return problems


def _to_compute_again(run: StoredRun, problems: Sequence[Problem]) -> tuple[list[tuple[Unit, int]], list[str]]:
    """Return the units, with their waves, and the Grams that hold something else than the model gives."""
    store = run.store
    units = set()
    for problem in problems:
        if problem.what == "gram":
            continue
        waves = range(len(store.waves)) if problem.parameter is None else [store.run.wave_of(problem.parameter)]
        units |= {(store.units[problem.first_sample // store.chunk_rows], wave) for wave in waves}
    grams = [problem.parameter for problem in problems if problem.what == "gram"]
    return sorted(units, key=lambda pair: (pair[1], pair[0].index)), grams


def verify_manifest(path: Path, *, repair: bool = True) -> list[Problem]:
    """Check the manifest and its copy; where one of them is damaged, `repair` restores it from the other.

    Raises:
        CorruptRunError: both are damaged.
        RunError: there is neither, or `repair` is asked for while another process writes the run.
    """
    if not (path / MANIFEST_COPY).exists():
        return []  # not a run, which opening it says, or one of an older version
    wrong = restore_manifest(path, dry_run=True)
    if wrong is None:
        return []
    if repair:
        with RunLock(path):
            restore_manifest(path)
    return [Problem("manifest", None, None, None, wrong)]


def _check_mean(run: StoredRun) -> tuple[list[Problem], list[tuple[Path, Problem]]]:
    """Return what is wrong with the mean, and the markers of units of the mean pass whose sums are damaged."""
    store, done = run.store, run.path / "done"
    whole, parts = [], []
    if not store.centered:
        return whole, parts
    if (done / "mean.json").is_file():
        for name in run.parameters:
            try:
                store.means.check(name)
            except CorruptRunError as error:
                whole.append(Problem("mean", name, None, None, str(error)))
    for unit in store.units:
        marker = done / f"mean-{unit.index:06d}.json"
        if not marker.is_file():
            continue
        for name, detail in store.means.wrong_parts(unit).items():
            parts.append((marker, Problem("mean_parts", name, unit.start, unit.stop - 1, detail)))
    return whole, parts


def _check_fields(run: StoredRun) -> list[tuple[Path, Problem]]:
    found = []
    for folder in sorted((run.path / "fields").glob("*")):
        if folder.name == "zarr.json":
            continue
        try:
            run.store.samples.read_field(folder)
        except CorruptRunError as error:
            found.append((folder, Problem("field", folder.name, None, None, str(error))))
    return found


def _check_eigenvectors(run: StoredRun) -> list[tuple[str, Problem]]:
    found = []
    for marks in sorted((run.path / "done" / "eigenvectors").glob("*")):
        folder = run.path / "eigenvectors" / marks.name
        try:
            finished = read_json(marks / "finished.json") if (marks / "finished.json").is_file() else {}
            identity = read_json(marks / "identity.json")
            for marker in marks.glob("*.json"):
                if marker.stem != "identity" and read_json(marker).get("marker", marker.stem) != marker.stem:
                    raise CorruptRunError(f"{marker} is another marker.")
            if "parameters" not in identity or "marker" in identity:
                raise CorruptRunError(f"{marks / 'identity.json'} is another marker.")
            names = ["solved", *(f"parameter-{node_name(name)}" for name in identity["parameters"])] if finished else []
            for name in names:
                read_json(marks / f"{name}.json")
            right = finished.get("files") in (None, chunk_digest(folder))
            detail = "not what was written"
        except (CorruptRunError, AttributeError, TypeError) as error:
            right, detail = False, str(error)
        if right and finished:
            try:
                for array in folder.rglob("zarr.json"):
                    node = zarr.open(array.parent, mode="r")
                    for part in _pieces(node):
                        node[part]
            except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
                right, detail = False, f"cannot be read ({error})"
        if not right:
            found.append((marks.name, Problem("eigenvectors", marks.name, None, None, detail)))
    return found


def _pieces(node: Any) -> list[slice]:
    """Return slices of the last axis of an array, a chunk wide; none for a group."""
    if not isinstance(node, zarr.Array):
        return []
    width = node.chunks[-1]
    return [(..., slice(start, start + width)) for start in range(0, node.shape[-1], width)]


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
    problems = []
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
    store, problems = run.store, []
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
