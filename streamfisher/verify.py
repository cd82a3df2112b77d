"""Is a stored run what was written? Every chunk is read and held against the checksums of its marker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from streamfisher.analysis import Run
from streamfisher.errors import CorruptRunError
from streamfisher.samples import Unit
from streamfisher.store import RunLock, codecs


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was written."""

    what: str  # 'rows', 'marker', 'loss', 'n_targets', 'valid', 'squared_norm' or 'gram'
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
    done = store.done_units()
    damaged_units: list[Unit] = []
    for unit in tqdm([u for u in store.units if u.index in done], desc="verify", unit="unit", disable=not progress):
        found = _check_unit(run, unit)
        if found:
            problems += found
            damaged_units.append(unit)
    damaged_grams = []
    for name in filter(store.has_gram, run.parameters):
        try:
            store.check_gram(name)
        except CorruptRunError as error:
            problems.append(Problem("gram", name, None, None, str(error)))
            damaged_grams.append(name)
    if repair and problems:
        with RunLock(run.path):
            for unit in damaged_units:
                store.forget_unit(unit)
            for name in run.parameters if damaged_units else damaged_grams:
                store.forget_gram(name)
    return problems


def _check_unit(run: Run, unit: Unit) -> list[Problem]:
    last = unit.stop - 1
    try:
        marker: dict[str, Any] = run.store.marker(unit)
        checksums = marker["crc32c"]
    except (CorruptRunError, KeyError, TypeError) as error:
        return [Problem("marker", None, unit.start, last, str(error))]
    problems = []
    for name in run.parameters:
        try:
            stored = run.store.read_unit(name, unit)
        except (ValueError, RuntimeError, OSError, CorruptRunError) as error:
            problems.append(Problem("rows", name, unit.start, last, f"cannot be read ({error})"))
            continue
        if codecs.checksum(stored) != checksums.get(name):
            problems.append(Problem("rows", name, unit.start, last, "not what was written"))
    return problems + _check_samples(run, unit)


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
