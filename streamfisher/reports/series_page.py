"""One self-contained HTML page about runs side by side: how each block moves over a series of checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from streamfisher.reports import figures
from streamfisher.reports.comparison import draw_comparison
from streamfisher.reports.page_parts import Report, Section, figures_html, rendered, write_page
from streamfisher.reports.verdict import Finding
from streamfisher.results.analyses import Comparison
from streamfisher.results.notebook import UNION, WHOLE, structure_name
from streamfisher.results.panels import eigenvalue_unit, matrix_name, model_name
from streamfisher.results.spectrum import WHOLE_MODEL

#: What is drawn over the runs: metric, its name in words, whether its axis is logarithmic.
_TRAJECTORIES = (
    ("largest_eigenvalue", "largest eigenvalue", True),
    ("trace", "trace", True),
    ("effective_rank", "effective rank", False),
)
_COLUMNS = ("trace", "largest_eigenvalue", "spectral_gap", "effective_rank", "stable_rank")
#: Relative change of a metric that is worth a word.
_MOVED = 0.05


def comparison_page(comparison: Comparison, path: str | Path) -> Report:
    """Write the page, whole or not at all: trajectories of every block, overlaps of eigenspaces, spectra, a table.

    Runs whose names differ by one number only, as `step-00000200.zarr`, are placed by it; others at equal distances.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    first = comparison.spectra[0]
    findings = tuple(_verdict(comparison))
    found = [Section("Trajectories", _trajectories(comparison))]
    if comparison.overlaps:
        found.append(Section("Overlap of leading eigenspaces", _overlaps(comparison)))
    found += [Section("Spectra", _spectra(comparison)), Section("Metrics", _table(comparison))]
    return write_page(
        path,
        "comparison.html",
        findings,
        found,
        name=f"{len(comparison.labels)} runs",
        model=model_name(first) or "a model",
        matrix=matrix_name(first),
        structure=structure_name(first),
        labels=comparison.labels,
        warnings=comparison.warnings,
    )


def places_of(labels: Sequence[str]) -> tuple[list[float], str]:
    """Return where runs stand on an axis, and what that counts: the one number in which their names differ, or 1, 2.

    Args:
        labels: of the runs.
    """
    split = [re.split(r"(\d+)", label) for label in labels]
    if len({len(parts) for parts in split}) == 1:
        differing = [i for i, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1]
        if len(differing) == 1 and differing[0] % 2:
            numbers = [float(parts[differing[0]]) for parts in split]
            words = re.findall(r"[A-Za-z]+", split[0][differing[0] - 1])
            if sorted(set(numbers)) == numbers:
                return numbers, words[-1].lower() if words else "number"
    return [float(number) for number in range(1, len(labels) + 1)], "run"


def _members(comparison: Comparison) -> list[tuple[str, str | None]]:
    """Return (name, key) of what has a trajectory: the blocks, and all parameters together."""
    blocks: list[tuple[str, str | None]] = [
        (WHOLE if key == "global" else key, key) for key in comparison.shared_blocks
    ]
    if comparison.shared_blocks == ("global",):
        return blocks
    whole = all(spectrum.whole is not None for spectrum in comparison.spectra)
    return [*blocks, (WHOLE, WHOLE_MODEL) if whole else (UNION, None)]


def _trajectories(comparison: Comparison) -> str:
    places, counted = places_of(comparison.labels)
    unit = eigenvalue_unit(comparison.spectra[0])
    drawn = []
    for metric, name, log in _TRAJECTORIES:
        lines = {line: comparison.trajectory(metric, key) for line, key in _members(comparison)}
        label = name if metric == "effective_rank" else f"{name}, {unit}"
        title = f"Trajectory: {name}"
        drawing = figures.trajectories(lines, places, counted, label, title, log=log, ticks=_ticks(comparison, counted))
        drawn.append((drawing, f"{name.capitalize()} of every block."))
    return figures_html(*drawn)


def _ticks(comparison: Comparison, counted: str) -> Sequence[str] | None:
    return comparison.labels if counted == "run" and len(comparison.labels) <= 8 else None


def _overlaps(comparison: Comparison) -> str:
    places, counted = places_of(comparison.labels)
    pairs = list(zip(comparison.labels, comparison.labels[1:], strict=False))
    lines: dict[str, np.ndarray] = {}
    for overlap in comparison.overlaps:
        name = WHOLE if overlap.block == "global" else overlap.block
        lines.setdefault(name, np.full(len(pairs), np.nan))[pairs.index(overlap.runs)] = overlap.mean_squared_cosine
    k = max(overlap.k for overlap in comparison.overlaps)
    drawing = figures.trajectories(
        lines,
        places[1:],
        counted,
        "mean squared cosine",
        "Overlap of leading eigenspaces",
        top=1.02,
        ticks=None if _ticks(comparison, counted) is None else comparison.labels[1:],
    )
    caption = f"Each run's {k} leading eigenvectors, or as many as are above noise, against those of the run before."
    return figures_html((drawing, f"{caption} 1: the same space; unrelated ones have about k / P."))


def _spectra(comparison: Comparison) -> str:
    drawing = figures.svg(
        lambda figure: draw_comparison(figure, comparison), **_size(comparison), title="Spectra of all runs"
    )
    return figures_html((drawing, "Eigenvalues above the noise floor, one panel per block."))


def _size(comparison: Comparison) -> dict[str, float]:
    columns = min(4, len(comparison.shared_blocks))
    rows = -(-len(comparison.shared_blocks) // columns)
    return {"width": max(3.0 * columns, 5.0), "height": 2.7 * rows + 0.4}


def _table(comparison: Comparison) -> str:
    rows = []
    for name, key in _members(comparison):
        values = np.stack([comparison.trajectory(metric, key) for metric in _COLUMNS], axis=1)
        for label, numbers in zip(comparison.labels, values.tolist(), strict=True):
            cells = ["-" if value != value else f"{value:.4g}" for value in numbers]
            rows.append((name, label, list(zip(_COLUMNS, numbers, cells, strict=True))))
    return rendered("series.html", columns=[name.replace("_", " ") for name in _COLUMNS], rows=rows)


def _verdict(comparison: Comparison) -> list[Finding]:
    """Say what went where between the first run and the last."""
    members = _members(comparison)
    all_name, all_key = members[-1]
    found = []
    for metric, question in (("trace", "Where did the trace go?"), ("effective_rank", "Where did the rank go?")):
        values = comparison.trajectory(metric, all_key)[[0, -1]]
        if not np.isfinite(values).all() or values[0] <= 0:
            continue
        answer = f"{metric.replace('_', ' ')} of the {all_name}: {values[0]:.4g} to {values[1]:.4g}"
        moved = {name: change for name, key in members[:-1] if (change := _change(comparison, metric, key))}
        if moved:
            most = max(moved, key=lambda name: abs(np.log(moved[name])))
            answer += f"; {most} changed the most, to {moved[most]:.3g} times what it was"
        found.append(Finding(question, answer + "."))
    if comparison.overlaps:
        ends = [overlap for overlap in comparison.overlaps if overlap.runs[1] == comparison.labels[-1]]
        if ends:
            low, *_, high = sorted([(overlap.mean_squared_cosine, overlap.block) for overlap in ends] * 2)
            answer = (
                f"between the last two runs the leading eigenspaces overlap by {low[0]:.2f} ({low[1]}) to "
                f"{high[0]:.2f} ({high[1]})."
            )
            found.append(Finding("Do the directions hold?", answer))
    return found


def _change(comparison: Comparison, metric: str, key: str | None) -> float | None:
    """Return the last value over the first, where it is worth a word."""
    first, last = comparison.trajectory(metric, key)[[0, -1]].tolist()
    if not (first > 0 and last > 0) or abs(last / first - 1) < _MOVED:
        return None
    return last / first
