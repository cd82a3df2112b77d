"""Is a stored run what was written? Every chunk is read and held against the checksums of its marker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from streamfisher.analysis import Run
from streamfisher.errors import CorruptRunError
from streamfisher.samples import Unit
from streamfisher.store import RunLock, codecs, stage_of
from streamfisher.store.factors import checksum_of


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was written."""

    what: str  # 'rows', 'factors', 'marker', 'loss', 'n_targets', 'valid', 'squared_norm' or 'gram'
    parameter: str | None
    first_sample: int | None
    last_sample: int | None
    detail: str

    def __str__(self) -> str:
        where = f" of {self.parameter}" if self.parameter else ""
        samples = "" if self.first_sample is None else f", samples {self.first_sample} to {self.last_sample}"
        return f"{self.what}{where}{samples}: {self.detail}"


def verify(run: Run, *, repair: bool = True, progress: bool = False) -> list[Problem]:
    """Read every finished unit and Gram and compare checksums.

    Args:
        run: to check.
        repair: remove the markers of what is damaged, so that the next `run` computes it again.
        progress: show a bar.

    Returns:
        What is wrong; empty where everything that is marked as finished is intact.

    Raises:
        RunError: `repair` is asked for while another process writes the run.
    """
    problems: list[Problem] = []
    store = run.store
    damaged: list[tuple[Unit, int]] = []  # units, and the waves they are damaged in
    done = {wave: store.done_units(stage_of(wave)) for wave in range(len(store.waves))}
    work = [(unit, wave) for wave in done for unit in store.units if unit.index in done[wave]]
    for unit, wave in tqdm(work, desc="verify", unit="unit", disable=not progress):
        found = _check_unit(run, unit, wave)
        if found:
            problems += found
            damaged.append((unit, wave))
    damaged_grams = []
    for key in filter(store.has_gram, store.gram_members):
        try:
            store.read_gram(key)
        except CorruptRunError as error:
            problems.append(Problem("gram", key, None, None, str(error)))
            damaged_grams.append(key)
    if repair and problems:
        with RunLock(run.path):
            for unit, wave in damaged:
                store.forget_unit(unit, wave)
            of_damaged = [name for _, wave in damaged for name in store.waves[wave]]
            for key in {*damaged_grams, *store.keys_of(of_damaged)}:
                store.forget_gram(key)
    return problems


def _check_unit(run: Run, unit: Unit, wave: int) -> list[Problem]:
    last = unit.stop - 1
    store = run.store
    try:
        marker: dict[str, Any] = store.marker(unit, wave)
        checksums = marker["crc32c"]
    except (CorruptRunError, KeyError, TypeError) as error:
        return [Problem("marker", None, unit.start, last, str(error))]
    problems = []
    here = [name for name in store.waves[wave] if not store.is_deleted(name)]
    for name in here:
        if store.representation(name) != "dense":
            continue
        try:
            stored = store.read_unit(name, unit)
        except (ValueError, RuntimeError, OSError, CorruptRunError) as error:
            problems.append(Problem("rows", name, unit.start, last, f"cannot be read ({error})"))
            continue
        if codecs.checksum(stored) != checksums.get(name):
            problems.append(Problem("rows", name, unit.start, last, "not what was written"))
    problems += _check_factors(run, unit, wave, [name for name in here if store.representation(name) == "factors"])
    return problems + _check_samples(run, unit)


def _check_factors(run: Run, unit: Unit, wave: int, names: Sequence[str]) -> list[Problem]:
    """Check the factors of a unit, each tensor once; a shared one is named after the first parameter it is part of."""
    problems = []
    seen: set[str] = set()
    for name in names:
        try:
            tensors = run.store.factor_checksums(unit, wave, name)
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


def _check_samples(run: Run, unit: Unit) -> list[Problem]:
    """Check what was seen per sample: chunks carry checksums of their own, and missing ones read as fill values."""
    values, problems = {}, []
    for what in ("valid", "n_targets", "squared_norm", "loss"):
        try:
            values[what] = run.store.read_sample_values(what, unit)
        except (ValueError, RuntimeError, OSError, CorruptRunError) as error:
            problems.append(Problem(what, None, unit.start, unit.stop - 1, f"cannot be read ({error})"))
    counted = values["valid"] == 1 if "valid" in values else slice(0)
    unwritten = {
        "valid": lambda found: found > 1,
        "n_targets": lambda found: found < 0,
        "squared_norm": np.isnan,
        "loss": lambda found: np.isnan(found[counted]),  # that of a skipped sample may be NaN
    }
    for what, found in values.items():
        if unwritten[what](found).any():
            problems.append(Problem(what, None, unit.start, unit.stop - 1, "a chunk is missing"))
    return problems
