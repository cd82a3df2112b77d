"""Which gradients stay, and which were deleted after their Grams were built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from streamfisher.errors import RunError
from streamfisher.runtime.own_files import remove_tree
from streamfisher.store.factors import FactorStore, delete_factors
from streamfisher.store.folder import RunFolder


class KeptGradients:
    """Which parameters' gradients are there after their wave was reduced."""

    def __init__(self, run: RunFolder, factors: FactorStore) -> None:
        self.run, self.factors = run, factors

    def is_deleted(self, name: str) -> bool:
        """Return whether a parameter's gradients were deleted after they were reduced."""
        return not is_kept(name, self.run.keep) and self._deleted_path(self.run.wave_of(name)).is_file()

    def delete(self, wave: int) -> None:
        """Delete the gradients of a wave that are not to be kept; the marker comes first, so a kill ends it later."""
        passing = [name for name in self.run.waves[wave] if not is_kept(name, self.run.keep)]
        if not passing:
            return
        self.run.mark(f"deleted-{wave}", {"parameters": passing})
        entries = [entry for unit in self.run.units for entry in self.factors.entries(unit, wave)]
        keep = {key for entry in entries for key in self._kept_keys(entry)}
        for name in passing:
            place = self.run.places[name].array
            self.run.arrays.pop(place, None)
            for chunks in (self.run.path / place).glob("c*"):
                remove_tree(self.run.path, chunks)
        keys = {key for entry in entries for key in entry["sides"]}
        delete_factors(self.factors.folder(wave), sorted(keys - keep))

    def want(self, wave: int) -> None:
        """Take back that a wave's gradients were deleted, because they are collected again."""
        self._deleted_path(wave).unlink(missing_ok=True)

    def _kept_keys(self, entry: Mapping[str, Any]) -> set[str]:
        return {
            key
            for name, uses in entry["pairs"].items()
            if is_kept(name, self.run.keep)
            for pair in uses
            for key in pair
        }

    def _deleted_path(self, wave: int) -> Path:
        return self.run.path / "done" / f"deleted-{wave}.json"

    def require(self, name: str) -> None:
        """Refuse to read gradients that were deleted.

        Raises:
            RunError: they were.
        """
        if self.is_deleted(name):
            raise RunError(
                f"{self.run}: the gradients of {name} were not kept after its Gram was built. Eigenvectors are made by "
                "one more pass with the model, `streamfisher eigenvectors RUN.zarr MODEL DATA --block ...`; what else "
                "needs rows needs a run with --keep-gradients all, or with a pattern that matches it."
            )


def is_kept(name: str, keep: Sequence[str]) -> bool:
    """Return whether a parameter's gradients stay on disk after its Gram is built."""
    return any(fnmatchcase(name, pattern) for pattern in keep)
