"""Is a stored run what was written? Every chunk is read and held against the checksums of its marker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from streamfisher.analysis.run import StoredRun
from streamfisher.data.batches import Unit
from streamfisher.errors import ConfigError
from streamfisher.runtime.own_files import require_own_files
from streamfisher.store import RunLock
from streamfisher.store.layout import MANIFEST_COPY
from streamfisher.store.repair import restore_manifest
from streamfisher.verification.checks import (
    Check,
    ConfigCheck,
    EigenvectorCheck,
    FieldCheck,
    GramCheck,
    MeanCheck,
    MetadataCheck,
    NamedArrayCheck,
    ResultCheck,
    SpectrumCheck,
    TextCheck,
    UnitCheck,
    forget_units,
)
from streamfisher.verification.problem import Problem
from streamfisher.verification.recompute import deep_problems


def verify(
    run: StoredRun,
    *,
    repair: bool = False,
    progress: bool = False,
    deep: int | None = None,
    model: nn.Module | None = None,
    samples: Any = None,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    seed: int = 0,
) -> list[Problem]:
    """Read every finished unit and Gram and compare checksums; nothing is changed unless `repair` asks for it.

    Args:
        run: to check.
        repair: remove the markers of what is damaged, so that the next `run` computes it again, with model and data.
            A Gram whose own checksum is right stays, also where rows that it was made of are damaged.
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
    metadata = MetadataCheck(run)
    problems = metadata.find()
    if problems and repair:  # before anything is read through them
        with RunLock(run.path):
            metadata.repair()
    checks: list[Check] = [
        UnitCheck(run, progress=progress),
        GramCheck(run),
        MeanCheck(run),
        FieldCheck(run),
        EigenvectorCheck(run),
        ResultCheck(run),
        SpectrumCheck(run),
        NamedArrayCheck(run),
        ConfigCheck(run),
        TextCheck(run),
    ]
    for check in checks:
        problems += check.find()
    if deep is not None and model is not None and not problems:
        recomputed = RecomputedCheck(run, deep_problems(run, model, samples, count=deep, loss=loss, seed=seed))
        problems = recomputed.find()
        checks = [recomputed]
    if repair and problems:
        with RunLock(run.path):
            for check in checks:
                check.repair()
    return problems


class RecomputedCheck:
    """What the model gives, of a few samples."""

    def __init__(self, run: StoredRun, problems: Sequence[Problem]) -> None:
        self.run, self.problems = run, list(problems)

    def find(self) -> list[Problem]:
        """Return where the run holds something else."""
        return self.problems

    def repair(self) -> None:
        """Forget the units and Grams that hold it."""
        units, grams = _to_compute_again(self.run, self.problems)
        forget_units(self.run, units)
        for key in grams:
            self.run.store.grams.forget(key)


def unfinished(run: StoredRun) -> str | None:
    """Return in words how far an unfinished run is; `None` where every sample is finished in every wave."""
    store = run.store
    done = sum(len(store.units[index]) for index in store.markers.finished_units())
    if done == store.n_samples:
        return None
    where = f" in all {len(store.waves)} waves" if len(store.waves) > 1 else ""
    return f"{done} of {store.n_samples} samples are finished{where}"


def only_by_a_new_pass(run: StoredRun) -> list[str]:
    """Return the Gram keys that are not there and whose gradients were deleted, so that they cannot be built."""
    store = run.store
    return [
        key
        for key, members in store.gram_members.items()
        if not store.grams.has(key) and any(store.kept.is_deleted(name) for name in members)
    ]


def _to_compute_again(run: StoredRun, problems: Sequence[Problem]) -> tuple[list[tuple[Unit, int]], list[str]]:
    """Return the units, with their waves, and the Grams that hold something else than the model gives."""
    store = run.store
    units: set[tuple[Unit, int]] = set()
    for problem in problems:
        if problem.what == "gram" or problem.first_sample is None:
            continue
        waves = range(len(store.waves)) if problem.parameter is None else [store.run.wave_of(problem.parameter)]
        units |= {(store.units[problem.first_sample // store.chunk_rows], wave) for wave in waves}
    grams = [problem.parameter for problem in problems if problem.what == "gram" and problem.parameter]
    return sorted(units, key=lambda pair: (pair[1], pair[0].index)), grams


def verify_manifest(path: Path, *, repair: bool = False) -> list[Problem]:
    """Check the manifest and its copy; where one of them is damaged, `repair` restores it from the other.

    Raises:
        CorruptRunError: both are damaged.
        RunError: there is neither, or `repair` is asked for while another process writes the run.
    """
    if (path / "manifest.json").is_file() or (path / MANIFEST_COPY).is_file():
        require_own_files(path)
    if not (path / MANIFEST_COPY).exists():
        return []  # not a run, which opening it says, or one of an older version
    wrong = restore_manifest(path, dry_run=True)
    if wrong is None:
        return []
    if repair:
        with RunLock(path):
            restore_manifest(path)
    return [Problem("manifest", None, None, None, wrong)]
