"""What a spectrum says, in words: what dominates, what stands apart, is it block-diagonal, is N enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from streamfisher.results.analyses import Growth
from streamfisher.results.spectrum import WHOLE_MODEL, BlockSpectrum, Spectrum
from streamfisher.runtime.printable import printable

Mood = Literal["good", "fair", "poor", "plain"]

#: Blocks are named until they carry so much of the trace, but no more than so many.
_MOST_OF_IT, _MOST_NAMED = 0.8, 4
#: lambda_1 / lambda_2 from which an eigenvalue is said to stand apart.
_APART = 3.0
#: Relative error of the block-diagonal approximation: below the first it is a good one, above the second none.
_NEAR, _FAR = 0.1, 0.5
#: Growth of the effective rank at the last doubling: below the first N is enough, above the second it is not.
_CONVERGED, _GROWING = 0.05, 0.15
#: Growth over a larger factor says nothing about the next doubling.
_FARTHEST = 4
#: No more doublings than that are advised, for no extrapolation reaches further.
_MOST_DOUBLINGS = 2


@dataclass(frozen=True)
class Finding:
    """One sentence of a verdict."""

    question: str
    answer: str
    mood: Mood = "plain"


def verdict(spectrum: Spectrum, growth: Growth | None = None) -> list[Finding]:
    """Return what a spectrum says, in the order in which it is asked.

    Args:
        spectrum: of several blocks, or of the whole.
        growth: of the same samples: whether N is enough.
    """
    found = [
        _dominant(spectrum),
        _gap(spectrum),
        _rank(spectrum),
        _diagonal(spectrum),
        _enough(growth),
        _noise(spectrum),
    ]
    return [finding for finding in found if finding is not None]


def verdict_text(findings: Sequence[Finding]) -> str:
    """Return the sentences one below the other, for a terminal."""
    return "\n".join(f"  {printable(finding.question)} {printable(finding.answer)}" for finding in findings)


def _of_all(spectrum: Spectrum) -> tuple[BlockSpectrum, str]:
    whole = spectrum.whole
    return (spectrum.global_, "the union of blocks") if whole is None else (whole, "the whole model")


def _dominant(spectrum: Spectrum) -> Finding | None:
    blocks = {name: block.trace for name, block in spectrum.reached.items() if block.trace > 0}
    total = sum(blocks.values())
    if len(blocks) < 2 or not total > 0:
        return None
    shares = sorted(((trace / total, name) for name, trace in blocks.items()), reverse=True)
    named: list[tuple[float, str]] = []
    while sum(share for share, _ in named) < _MOST_OF_IT and len(named) < min(_MOST_NAMED, len(shares)):
        named.append(shares[len(named)])
    if sum(share for share, _ in named) < _MOST_OF_IT / 2:  # spread over many
        share, name = shares[0]
        return Finding(
            "What dominates?", f"nothing: of {len(blocks)} blocks the largest, {name}, has {share:.0%} of the trace."
        )
    each = f" ({', '.join(f'{share:.0%}' for share, _ in named)})" if len(named) > 1 else ""
    carry = "carry" if len(named) > 1 else "carries"
    answer = f"{_list([name for _, name in named])} {carry} {sum(s for s, _ in named):.0%} of the trace{each}."
    return Finding("What dominates?", answer)


def _gap(spectrum: Spectrum) -> Finding | None:
    block, of = _of_all(spectrum)
    values = block.eigenvalues[block.above_floor]
    if len(values) < 2 or not block.trace > 0:
        return None
    ratio, share = float(values[0] / values[1]), float(values[0] / block.trace)
    apart = "stands apart" if ratio >= _APART else "does not stand apart"
    answer = (
        f"the largest eigenvalue of {of} {apart}: {values[0]:.4g}, {ratio:.2g} times the second "
        f"(gap {values[0] - values[1]:.3g}), {share:.0%} of the trace."
    )
    return Finding("Is there a gap?", answer)


def _rank(spectrum: Spectrum) -> Finding | None:
    block, of = _of_all(spectrum)
    effective = block.metrics["effective_rank"]
    if effective is None or not block.above_floor.any():
        return None
    most = min(block.n_samples, block.n_params) if spectrum.whole is not None else len(block.eigenvalues)
    answer = (
        f"the effective rank of {of} is {effective:.1f}, {effective / most:.0%} of the {most:,} that it can be at most."
    )
    return Finding("How many directions?", answer)


def _diagonal(spectrum: Spectrum) -> Finding | None:
    error = spectrum.metadata.get("block_diagonal_error")
    if error is None or len(spectrum.blocks) < 2:
        return None
    mood: Mood = "good" if error < _NEAR else "fair" if error < _FAR else "poor"
    words = {"good": "yes, nearly", "fair": "roughly", "poor": "no"}
    answer = (
        f"{words[mood]}: without what lies between blocks the matrix is wrong by {error:.0%} (relative, Frobenius)."
    )
    return Finding("Is it block-diagonal?", answer, mood)


def _enough(growth: Growth | None) -> Finding | None:
    """Say by how much the effective rank still grows, and how many samples to try where it does."""
    if growth is None or len(growth.sizes) < 2:
        return None
    key = None if growth.spectra[-1].whole is None or len(growth.spectra[-1].blocks) < 2 else WHOLE_MODEL
    ranks = growth.curve("effective_rank", key)
    if not np.isfinite(ranks[-2:]).all() or ranks[-2] <= 0:
        return None
    n, before = growth.sizes[-1], growth.sizes[-2]
    if n > _FARTHEST * before:
        reached = f"growth was only solved up to {before:,} of {n:,} samples, for want of time"
        return Finding("Is N enough?", f"not known: {reached}; `report --seconds` gives it more.", "fair")
    grew = float(ranks[-1] / ranks[-2]) - 1.0
    step = "the last doubling" if n == 2 * before or n == 2 * before + 1 else "the last step"
    said = f"the effective rank grew {grew:.0%} at {step} ({before:,} to {n:,} samples)"
    if grew < _CONVERGED:
        return Finding("Is N enough?", f"yes: {said}.", "good")
    doublings = _doublings(ranks, grew)
    advice = f"try {n * 2**doublings:,}"
    if grew < _GROWING:
        return Finding("Is N enough?", f"nearly: {said}; to be sure, {advice}.", "fair")
    return Finding("Is N enough?", f"no: {said}; {advice}.", "poor")


def _doublings(ranks: np.ndarray, grew: float) -> int:
    """Return after how many doublings growth would have ended, if it goes on slowing down as it did; 2 at most."""
    if len(ranks) < 3 or not np.isfinite(ranks[-3]) or ranks[-3] <= 0:
        return 2
    slowing = grew / max(float(ranks[-2] / ranks[-3]) - 1.0, 1e-9)
    if not 0 < slowing < 0.98:
        return _MOST_DOUBLINGS
    return int(min(max(math.ceil(math.log(_CONVERGED / grew) / math.log(slowing)), 1), _MOST_DOUBLINGS))


def _noise(spectrum: Spectrum) -> Finding | None:
    block, of = _of_all(spectrum)
    facts: Mapping[str, Any] = spectrum.metadata
    if facts.get("projection"):
        return Finding(
            "How exact is it?", "an estimate: rows are random projections; error bars are in the files.", "fair"
        )
    above, listed = int(block.above_floor.sum()), len(block.eigenvalues)
    if not listed:
        return None
    answer = f"{above:,} of {listed:,} eigenvalues of {of} lie above the noise floor ({block.noise_floor:.2g})."
    return Finding("How exact is it?", answer, "good" if above >= 0.9 * listed else "fair")


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
