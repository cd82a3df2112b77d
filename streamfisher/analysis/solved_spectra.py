"""Spectra that a run keeps, so that what took long to solve is not solved again.

A solution is found by all that it depends on: which blocks, samples and weights, how it is solved, with which versions,
and the checksums of the Grams as they are now. Any of these another, and it is another question. What is kept is held
against the form of a solution; whatever ails it, it is solved again. Damage of the Grams themselves is noticed as ever.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from streamfisher.results.spectrum import BlockSpectrum
from streamfisher.solving.solve import BlockSolutions, Eigenproblem
from streamfisher.store.spectra import SpectrumStore
from streamfisher.version import versions

#: Raised where the same question has another answer than before.
_REVISION = 1
#: What took fewer seconds is as quick to solve again, and reading a run leaves nothing in it.
_WORTH = 2.0
_FIELDS = tuple(field.name for field in dataclasses.fields(BlockSpectrum))


class SolvedSpectra:
    """The solutions that one run keeps."""

    def __init__(self, store: SpectrumStore) -> None:
        self.store = store

    def found_or(
        self, asked: Mapping[str, Any], solve: Callable[[], BlockSolutions], *, keep: bool | None = None
    ) -> BlockSolutions:
        """Return what is kept of a question; else solve it, and keep it where that took long.

        Args:
            asked: see `question`.
            solve: answers it.
            keep: whatever it took; `None`: what took two seconds.

        Raises:
            StreamfisherError: as `solve`.
        """
        found = self.find(asked)
        if found is None:
            begun = time.monotonic()
            found = solve()
            self.keep(asked, found, time.monotonic() - begun if keep is None else math.inf if keep else -math.inf)
        return found

    def find(self, asked: Mapping[str, Any]) -> BlockSolutions | None:
        """Return what is kept of a question; `None`: nothing that can be used."""
        if not self.store.folder.is_dir():
            return None
        whole = self._with_grams(asked)
        kept = self.store.read(_key(whole))
        try:
            return _decoded(kept["solved"]) if kept is not None and kept["asked"] == _plain(whole) else None
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def keep(self, asked: Mapping[str, Any], solved: BlockSolutions, seconds: float) -> None:
        """Keep a solution that took so many seconds, if that is worth it and the run can be written."""
        if seconds < _WORTH:
            return
        whole = self._with_grams(asked)
        self.store.write(_key(whole), {"asked": _plain(whole), "solved": _encoded(solved)})

    def _with_grams(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        return {**asked, "grams": {name: self.store.gram_facts(name) for name, _ in asked["blocks"]}}


def question(problem: Eigenproblem, *, by: str = "Grams") -> dict[str, Any]:
    """Return all that the solution of a problem depends on but its Grams, as plain JSON values.

    Args:
        problem: of the stored Grams of a run.
        by: how it is solved, where that decides its last digits.
    """
    selection = problem.selection
    assert selection is not None  # stored Grams are always of a selection
    samples, weights = np.ascontiguousarray(selection.samples, dtype=np.int64), selection.weights
    return {
        "revision": _REVISION,
        "by": by,
        "versions": versions(),
        "cuda": torch.cuda.is_available(),
        "blocks": [[name, key] for name, key in problem.assignment.items()],
        "parameters": {name: problem.parameters[name] for name in problem.assignment},
        "samples": [len(samples), hashlib.sha256(samples.tobytes()).hexdigest()],
        "weights": None if weights is None else hashlib.sha256(weights.tobytes()).hexdigest(),
        "denominator": selection.denominator.hex(),
        "normalization": selection.normalization,
        "center": problem.center,
        "config": problem.config.to_dict(),
        "precision": [str(problem.precision.computed), problem.precision.roundoff],
        "top_k": problem.top_k,
        "single": None if problem.single is None else sorted(problem.single),
        "whole": problem.whole,
    }


def _plain(content: Any) -> Any:
    return json.loads(json.dumps(content))


def _key(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _encoded(solved: BlockSolutions) -> dict[str, Any]:
    return {
        **{name: getattr(solved, name) for name in ("traces", "squared", "whole_squared", "dominance")},
        "blocks": [[key, _encoded_block(block)] for key, block in solved.blocks.items()],
        "whole": None if solved.whole is None else _encoded_block(solved.whole),
    }


def _encoded_block(block: BlockSpectrum) -> dict[str, Any]:
    found = {}
    for name in _FIELDS:
        value = getattr(block, name)
        if isinstance(value, np.ndarray):
            data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
            found[name] = {"dtype": value.dtype.str, "data": data}
        elif isinstance(value, float) and not math.isfinite(value):
            found[name] = {"float": str(value)}
        else:
            found[name] = value
    return found


def _decoded(content: Mapping[str, Any]) -> BlockSolutions:
    """Return a solution from what `_encoded` gave.

    Raises:
        KeyError, TypeError, ValueError: it has not the form of one.
    """
    whole = content["whole"]
    return BlockSolutions(
        {str(key): _decoded_block(block) for key, block in content["blocks"]},
        {str(name): float(value) for name, value in content["traces"].items()},
        squared=float(content["squared"]),
        whole_squared=float(content["whole_squared"]),
        dominance=float(content["dominance"]),
        whole=None if whole is None else _decoded_block(whole),
    )


def _decoded_block(content: Mapping[str, Any]) -> BlockSpectrum:
    values = {name: _decoded_value(content[name]) for name in _FIELDS}
    block = BlockSpectrum(**values)
    listed = block.eigenvalues
    if listed.dtype != np.float64 or block.above_floor.dtype != bool or block.above_floor.shape != listed.shape:
        raise ValueError("not the eigenvalues of a block")
    return block


def _decoded_value(value: Any) -> Any:
    if not isinstance(value, dict) or not ({"data", "float"} & set(value)):
        return value
    if "float" in value:
        return float(value["float"])
    return np.frombuffer(base64.b64decode(value["data"], validate=True), dtype=np.dtype(value["dtype"])).copy()
