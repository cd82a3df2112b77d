"""A comparison of runs for people: a table, and the spectra overlaid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import require
from streamfisher.results.analyses import Comparison
from streamfisher.results.line_styles import COLOURS, DASHES
from streamfisher.results.notebook import UNION, WHOLE, structure_name
from streamfisher.results.panels import as_text, band, eigenvalue_unit, model_name
from streamfisher.results.spectrum import BlockSpectrum, Spectrum
from streamfisher.runtime.printable import printable

BlockOf = Callable[[Spectrum], BlockSpectrum | None]

_METRICS = ("trace", "largest_eigenvalue", "spectral_gap", "condition_number", "effective_rank", "stable_rank")


def comparison_table(comparison: Comparison) -> str:
    """Return metrics of every shared block with one line per run, overlaps, and what to beware of."""
    rows: list[tuple[str, ...]] = [("block", "run", *(name.replace("_", " ") for name in _METRICS))]
    of_all: list[tuple[str, BlockOf]] = []
    if comparison.shared_blocks != ("global",):
        of_all = [(UNION, lambda spectrum: spectrum.global_), (WHOLE, lambda spectrum: spectrum.whole)]
    of_blocks: list[tuple[str, BlockOf]] = [
        (WHOLE if key == "global" else key, partial(_block, key=key)) for key in comparison.shared_blocks
    ]
    for name, block_of in (*of_blocks, *of_all):
        for label, spectrum in zip(comparison.labels, comparison.spectra, strict=True):
            block = block_of(spectrum)
            if block is None:
                continue
            values = block.metrics
            cells = ["-" if values[name] is None else f"{values[name]:.4g}" for name in _METRICS]
            drawn = None if spectrum.bootstrap is None else spectrum.bootstrap.of(block.name)
            if drawn is not None:
                intervals = [drawn.interval(name) for name in _METRICS]
                cells = [
                    cell if i is None else f"{cell} ({i.low:.4g} .. {i.high:.4g})"
                    for cell, i in zip(cells, intervals, strict=True)
                ]
            rows.append((name, label, *cells))
    lines = _aligned(rows)
    if comparison.overlaps:
        lines += ["", "Overlap of leading eigenspaces (mean squared cosine of the principal angles; 1: the same space)"]
        table: list[tuple[str, ...]] = [
            ("block", "runs", "k", "overlap", "of random", "smallest angle", "largest angle")
        ]
        for overlap in comparison.overlaps:
            angles = overlap.angles
            shown = (f"{overlap.mean_squared_cosine:.4f}", f"{min(overlap.k / overlap.n_params, 1):.1e}")
            degrees = (f"{angles[0]:.1f} deg", f"{angles[-1]:.1f} deg")
            table.append((overlap.block, " / ".join(overlap.runs), str(overlap.k), *shown, *degrees))
        lines += _aligned(table)
    lines += [f"Note: {text}." for text in comparison.warnings]
    return "\n".join(map(printable, lines))


def _block(spectrum: Spectrum, key: str) -> BlockSpectrum:
    return spectrum.blocks[key]


def comparison_picture(comparison: Comparison, path: str | Path) -> Path:
    """Draw the spectra of all runs over each other, one panel per shared block; return the path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "plots", "draw the comparison")
    from matplotlib.figure import Figure

    columns = min(4, len(comparison.shared_blocks))
    rows = -(-len(comparison.shared_blocks) // columns)
    figure = Figure(figsize=(max(3.6 * columns, 5), 3.0 * rows + 0.4), layout="constrained")
    draw_comparison(figure, comparison)
    figure.savefig(path, dpi=130)
    return Path(path)


def draw_comparison(figure: Any, comparison: Comparison) -> None:
    """Draw the spectra of all runs over each other on a matplotlib figure; ordered runs have a scale of colours."""
    keys = list(comparison.shared_blocks)
    columns = min(4, len(keys))
    axes = figure.subplots(-(-len(keys) // columns), columns, squeeze=False)
    colours = _colours(len(comparison.labels))
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for axis, key in zip(axes.flat, keys, strict=False):
        for number, (label, spectrum) in enumerate(zip(comparison.labels, comparison.spectra, strict=True)):
            block = spectrum.blocks[key]
            above = block.above_floor
            index = np.arange(1, len(above) + 1)[above]
            if spectrum.bootstrap is not None:
                band(axis, spectrum.bootstrap.blocks[key], block, colours[number])
            style = DASHES[number % len(DASHES)]
            unfinished = " (partial)" if spectrum.metadata.get("partial") else ""
            axis.loglog(
                index,
                block.eigenvalues[above],
                linestyle=style,
                color=colours[number],
                linewidth=1.5,
                label=as_text(label + unfinished),
            )
        axis.set_title(as_text(key), fontsize=10)
        axis.grid(which="major", linewidth=0.4, alpha=0.5)
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.suptitle(
        " and ".join(dict.fromkeys(as_text(model_name(spectrum)) for spectrum in comparison.spectra)), fontsize=10
    )
    figure.supxlabel(f"index of the eigenvalue (blocks: {as_text(structure_name(comparison.spectra[0]))})", fontsize=9)
    figure.supylabel(f"eigenvalue, {eigenvalue_unit(comparison.spectra[0])}", fontsize=9)


def _colours(count: int) -> list[str]:
    """Return a colour for each run: of a scale, where there are more than an eye tells apart."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.84 * number / (count - 1))) for number in range(count)]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
