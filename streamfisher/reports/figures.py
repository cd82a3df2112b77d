"""Figures of spectra, as files and as inline SVG: readable in print, and by the colour-blind.

Lines are told apart as `results.line_styles` says; heat maps use cividis, which is monotone in lightness and looks the
same to the colour-blind, and carry their numbers.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import require
from streamfisher.results.analyses import Growth
from streamfisher.results.line_styles import COLOURS, DASHES, line_styles
from streamfisher.results.notebook import WHOLE
from streamfisher.results.panels import (
    WHOLE_STYLE,
    as_text,
    bottom_of,
    draw_eigenvalues,
    drawn_blocks,
    label_lines,
    shown_indices,
)
from streamfisher.results.spectrum import WHOLE_MODEL, BlockSpectrum, Spectrum
from streamfisher.runtime.durable import replacing
from streamfisher.runtime.printable import printable


def svg(draw: Callable[[Any], None], *, width: float, height: float, title: str) -> str:
    """Return one figure as an SVG element without external resources; the same bytes for the same figure.

    Args:
        draw: draws on the figure that it is given.
        width: in inches.
        height: in inches.
        title: said by screen readers.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "plots", "draw the report")
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "path.simplify": False,  # the page reads values off the points
        "svg.hashsalt": title,
        "font.family": ["sans-serif"],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids must differ between the figures of one page.
    prefix = re.sub(r"[^a-z0-9]+", "-", title.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'((?:xlink:)?href="#)', rf"\1{prefix}-", text)
    text = text.replace("url(#", f"url(#{prefix}-")
    escaped = printable(title).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    plot = _plot(figure, prefix)
    data = "" if plot is None else f'data-plot="{html.escape(plot)}" '
    return text.replace("<svg ", f'<svg role="img" aria-label="{escaped}" {data}', 1)


def _plot(figure: Any, prefix: str) -> str | None:
    """Return as JSON where the axes of a figure are and which lines have names, for the script of the page."""
    axis = figure.axes[0]
    lines = {line.get_gid(): line for line in axis.get_lines() if line.get_gid()}
    names = {gid: line.get_label() for gid, line in lines.items() if gid.startswith("curve-") and len(line.get_xdata())}
    if not names:
        return None
    width, height = 72 * figure.get_size_inches()
    box = axis.get_position()
    across, down = [box.x0 * width, box.x1 * width], [height - box.y0 * height, height - box.y1 * height]
    content = {
        "x": [*across, *map(float, axis.get_xlim()), axis.get_xscale() == "log"],
        "y": [*down, *map(float, axis.get_ylim()), axis.get_yscale() == "log"],
        "curves": [
            [f"{prefix}-{gid}", f"{prefix}-faint-{gid[6:]}", name.replace("\\$", "$").strip()]
            for gid, name in names.items()
        ],
    }
    return json.dumps(content)


def eigenvalue_curves(spectrum: Spectrum, title: str) -> str:
    """Draw eigenvalues against their index, as `picture` does."""

    def draw(figure: Any) -> None:
        draw_eigenvalues(figure.subplots(), spectrum)

    return svg(draw, width=5.9, height=4.7, title=title)


def densities(spectra: Sequence[tuple[str, BlockSpectrum]], title: str, unit: str) -> str:
    """Draw the spectral density: the share of eigenvalues per decade, above the noise floor."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        logs = [np.log10(block.eigenvalues[block.above_floor]) for _, block in spectra]
        everything = np.concatenate(logs)
        if not everything.size:
            axis.text(0.5, 0.5, "nothing above the noise floor", ha="center", transform=axis.transAxes)
            return
        low, high = everything.min() - 0.1, everything.max() + 0.1
        edges = np.linspace(low, high, 12 + int(np.sqrt(everything.size)))
        for number, ((name, _), values) in enumerate(zip(spectra, logs, strict=True)):
            if values.size:
                density = np.histogram(values, edges)[0] / values.size / np.diff(edges)
                style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
                axis.stairs(density, edges, label=as_text(name), linewidth=1.5, **style)
        axis.set_xlabel(f"log10 of the eigenvalue, {unit}")
        axis.set_ylabel("share per decade")
        axis.legend(fontsize=7, frameon=False)

    return svg(draw, width=5.9, height=3.4, title=title)


def cumulative_variance(spectrum: Spectrum, title: str) -> str:
    """Draw the share of the trace in the k leading eigenvalues of each block, and of the whole model."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        blocks = {name: block for name, block in drawn_blocks(spectrum).items() if block.trace > 0}
        styles = {WHOLE: WHOLE_STYLE} if WHOLE in blocks else line_styles(blocks)
        whole = spectrum.whole if len(spectrum.blocks) > 1 else None
        lines = [(block, styles[name], name) for name, block in blocks.items()]
        for block, style, name in (
            [(whole, WHOLE_STYLE, WHOLE)] if whole is not None and whole.trace > 0 else []
        ) + lines:
            share = np.cumsum(block.eigenvalues) / block.trace
            look = {"color": style.colour, "linestyle": style.dashes, "linewidth": style.width}
            shown = shown_indices(len(share))
            gid = f"curve-{len(axis.get_lines())}"
            axis.semilogx(shown, share[shown - 1], label=as_text(name), gid=gid, **look)
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("number of leading eigenvalues")
        axis.set_ylabel("share of the trace")
        axis.grid(which="major", linewidth=0.4, alpha=0.5)
        if len(blocks) > 1:
            label_lines(axis, styles, whole=whole is not None)

    return svg(draw, width=5.9, height=4.7, title=title)


def growth_curves(growth: Growth, metric: str, label: str, title: str, *, log: bool = False) -> str:
    """Draw a metric of every block, and of the whole model, against the number of samples, of nested subsets."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        names = [name for name in growth.spectra[-1].reached if name != "global"]
        styles = line_styles(names)
        whole = growth.spectra[-1].whole is not None
        if whole:
            values = growth.curve(metric, None if not names else WHOLE_MODEL)
            look = {"color": WHOLE_STYLE.colour, "linewidth": WHOLE_STYLE.width, "label": WHOLE}
            axis.plot(growth.sizes, values, marker="s", markersize=5, gid="curve-0", **look)
        for name in names:
            style = styles[name]
            look = {"color": style.colour, "linestyle": style.dashes, "linewidth": style.width, "label": as_text(name)}
            gid = f"curve-{1 + len(axis.get_lines())}"
            axis.plot(growth.sizes, growth.curve(metric, name), marker="o", markersize=3, gid=gid, **look)
        axis.set_xscale("log", base=2)
        axis.set_xticks(growth.sizes, [str(size) for size in growth.sizes])
        axis.minorticks_off()
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_xlabel("samples")
        axis.set_ylabel(label)
        axis.grid(which="major", linewidth=0.4, alpha=0.5)
        label_lines(axis, styles, whole=whole)

    return svg(draw, width=5.9, height=4.3, title=title)


def trajectories(
    lines: Mapping[str, np.ndarray],
    places: Sequence[float],
    counted: str,
    label: str,
    title: str,
    *,
    log: bool = False,
    top: float | None = None,
    ticks: Sequence[str] | None = None,
) -> str:
    """Draw a metric of every block over a series of runs.

    Args:
        lines: name of a block -> (runs,) float64; NaN where undefined.
        places: of the runs on the axis, ascending.
        counted: what the places count: 'step'.
        label: of the metric.
        title: of the figure.
        log: of the metric's axis.
        top: of the metric's axis, which then begins at 0.
        ticks: names of the runs, where they say more than their places.
    """

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        styles = line_styles([name for name in lines if name != WHOLE])
        for name, values in lines.items():
            style = WHOLE_STYLE if name == WHOLE else styles[name]
            look = {"color": style.colour, "linestyle": style.dashes, "linewidth": style.width, "label": as_text(name)}
            gid = f"curve-{len(axis.get_lines())}"
            axis.plot(places, values, marker="s" if name == WHOLE else "o", markersize=3, gid=gid, **look)
        if ticks is not None:
            axis.set_xticks(places, list(map(as_text, ticks)), rotation=30, ha="right", fontsize=7)
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0, top=top)
        axis.set_xlabel(counted)
        axis.set_ylabel(label)
        axis.grid(which="major", linewidth=0.4, alpha=0.5)
        label_lines(axis, styles, whole=WHOLE in lines)

    return svg(draw, width=5.9, height=4.3, title=title)


def heat_map(
    matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, *, label: str, log: bool = False
) -> str:
    """Draw a matrix with its numbers; NaN stays empty.

    Args:
        matrix: (rows, columns) float64.
        rows: names.
        columns: names.
        title: of the figure.
        label: of the colour bar.
        log: logarithmic colours, for values that span decades.
    """
    from matplotlib.colors import LogNorm

    shown = np.ma.masked_invalid(np.where(matrix > 0, matrix, np.nan) if log else matrix)
    numbers = len(columns) <= 14

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        norm = LogNorm() if log and shown.count() else None
        image = axis.imshow(shown, cmap="cividis", aspect="auto", norm=norm)
        axis.set_xticks(range(len(columns)), list(map(as_text, columns)), rotation=35, ha="right", fontsize=8)
        axis.set_yticks(range(len(rows)), list(map(as_text, rows)), fontsize=8)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        figure.colorbar(image, ax=axis, label=label, shrink=0.9)
        for i, j in zip(*np.nonzero(~shown.mask if shown.mask.ndim else np.ones(shown.shape)), strict=True):
            if numbers:
                dark = image.norm(shown[i, j]) < 0.55
                axis.text(j, i, f"{shown[i, j]:.3g}", ha="center", va="center", fontsize=7, color="w" if dark else "k")

    return svg(draw, width=max(4.2, 1.6 + 0.62 * len(columns)), height=max(2.2, 1.2 + 0.32 * len(rows)), title=title)


def picture(spectra: Sequence[Spectrum], path: str | Path) -> Path:
    """Draw the eigenvalues of every block against their index, log-log, one panel per spectrum; return the path.

    See `results.panels.draw_eigenvalues`, which draws each panel.

    Args:
        spectra: one panel each.
        path: its suffix says which kind (.png, .svg, .pdf).

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "plots", "draw the spectrum")
    from matplotlib.figure import Figure

    grid = _grid(spectra)
    rows, columns = 1 + max(row for row, _ in grid), 1 + max(column for _, column in grid)
    figure = Figure(figsize=(5.2 * columns, 4.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat:
        axis.set_visible(False)
    bottom = bottom_of(spectra)
    for place, spectrum in zip(grid, spectra, strict=True):
        axes[place].set_visible(True)
        draw_eigenvalues(axes[place], spectrum, bottom=bottom)
        if place[1]:
            axes[place].set_ylabel("")
    path = Path(path)
    if not path.suffix:
        path = path.with_suffix(".png")
    kind = path.suffix.removeprefix(".").lower()
    with replacing(path) as partial:
        figure.savefig(partial, format=kind, dpi=130, metadata={"Software": None} if kind == "png" else None)
    return path


def _grid(spectra: Sequence[Spectrum]) -> list[tuple[int, int]]:
    """Return (row, column) of each spectrum: block structures side by side, centered below uncentered."""
    keys = [(bool(s.metadata.get("centered")), str(s.metadata.get("block_structure"))) for s in spectra]
    if len(set(keys)) < len(keys):
        return [(number // 3, number % 3) for number in range(len(spectra))]
    rows, columns = sorted({center for center, _ in keys}), list(dict.fromkeys(name for _, name in keys))
    return [(rows.index(center), columns.index(name)) for center, name in keys]
