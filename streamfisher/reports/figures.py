"""Figures of spectra as inline SVG: readable in print, and by the colour-blind.

Lines differ in colour (Okabe and Ito) and in dashes; heat maps use cividis, which is monotone in lightness and looks
the same to the colour-blind, and carry their numbers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import require
from streamfisher.results.analyses import Growth
from streamfisher.results.bootstrap import BlockBootstrap
from streamfisher.results.notebook import partial_prefix, structure_name
from streamfisher.results.spectrum import BlockSpectrum, Spectrum
from streamfisher.runtime.durable import replacing
from streamfisher.runtime.printable import printable

#: Okabe and Ito's colours, told apart by the colour-blind; line styles tell apart what repeats.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")

_LEGEND = 16  # more entries than that say nothing


def as_text(name: object) -> str:
    """Return a name as a figure shows it: dollars begin no formula, nothing is hidden, no letter is missing in XML."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # a legend leaves such labels out


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
    return text.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)


def eigenvalue_curves(spectrum: Spectrum, title: str) -> str:
    """Draw eigenvalues against their index, log-log, with noise floors (dotted) and bootstrap intervals (bands)."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        panel(axis, spectrum)
        axis.set_title("")
        axis.set_ylabel("eigenvalue")
        known = [block for block in spectrum.blocks.values() if block.above_floor.any()]
        for number, block in enumerate(spectrum.blocks.values()):
            if block.above_floor.any():
                axis.axhline(block.noise_floor, color=COLOURS[number % len(COLOURS)], linestyle=":", linewidth=0.8)
        if known:
            floors = [block.noise_floor for block in known]
            least = min(float(block.eigenvalues[block.above_floor].min()) for block in known)
            axis.set_ylim(bottom=max(min(floors) / 3, least / 30))

    return svg(draw, width=5.4, height=3.9, title=title)


def densities(spectra: Sequence[tuple[str, BlockSpectrum]], title: str) -> str:
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
                style = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}
                axis.stairs(density, edges, label=as_text(name), linewidth=1.5, **style)
        axis.set_xlabel("log10 of the eigenvalue")
        axis.set_ylabel("share per decade")
        axis.legend(fontsize=7, frameon=False)

    return svg(draw, width=5.4, height=3.2, title=title)


def cumulative_variance(spectrum: Spectrum, title: str) -> str:
    """Draw the share of the trace in the k leading eigenvalues of each block."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        blocks = [*spectrum.blocks.values()]
        blocks += [spectrum.global_] if len(blocks) > 1 else []
        for number, block in enumerate(blocks):
            if block.trace > 0:
                share = np.cumsum(block.eigenvalues) / block.trace
                whole = block is spectrum.global_
                colour = "#000000" if whole else COLOURS[number % len(COLOURS)]
                style = "-" if whole else STYLES[number // len(COLOURS) % len(STYLES)]
                index = np.arange(1, len(share) + 1)
                axis.semilogx(
                    index, share, style, color=colour, linewidth=2.2 if whole else 1.3, label=as_text(block.name)
                )
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("number of leading eigenvalues")
        axis.set_ylabel("share of the trace")
        axis.grid(which="major", linewidth=0.4, alpha=0.5)
        if len(blocks) <= _LEGEND:
            axis.legend(fontsize=7, frameon=False, ncols=2 if len(blocks) > 6 else 1)

    return svg(draw, width=5.4, height=3.9, title=title)


def growth_curves(growth: Growth, metric: str, label: str, title: str, *, log: bool = False) -> str:
    """Draw a metric of every block against the number of samples, of nested subsets."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        names = list(growth.spectra[0].blocks)
        for number, name in enumerate(names):
            style = STYLES[number // len(COLOURS) % len(STYLES)]
            colour = COLOURS[number % len(COLOURS)]
            values = growth.curve(metric, name)
            axis.plot(growth.sizes, values, style, color=colour, marker="o", markersize=3, label=as_text(name))
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
        if len(names) <= _LEGEND:
            axis.legend(fontsize=7, frameon=False, ncols=2 if len(names) > 6 else 1)

    return svg(draw, width=5.4, height=3.6, title=title)


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

    Eigenvalues below a block's noise floor are drawn faint: they are rounding.

    Args:
        spectra: one panel each.
        path: its suffix says which kind (.png, .svg, .pdf).

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "plots", "draw the spectrum")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grid = _grid(spectra)
    rows, columns = 1 + max(row for row, _ in grid), 1 + max(column for _, column in grid)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.8 * columns, 3.8 * rows), squeeze=False, sharey=True, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for place, spectrum in zip(grid, spectra, strict=True):
        axes[place].set_visible(True)
        panel(axes[place], spectrum)
    least = [v[m].min() for s in spectra for v, m in _eigenvalues(s) if m.any()]
    if least:
        axes[0, 0].set_ylim(bottom=min(least) / 3)  # what is only rounding is not worth the room
    for axis in axes[:, 0]:
        axis.set_ylabel("eigenvalue")
    path = Path(path)
    if not path.suffix:
        path = path.with_suffix(".png")
    kind = path.suffix.removeprefix(".").lower()
    with replacing(path) as partial:
        figure.savefig(partial, format=kind, dpi=130, metadata={"Software": None} if kind == "png" else None)
    pyplot.close(figure)
    return path


def _grid(spectra: Sequence[Spectrum]) -> list[tuple[int, int]]:
    """Return (row, column) of each spectrum: block structures side by side, centered below uncentered."""
    keys = [(bool(s.metadata.get("centered")), str(s.metadata.get("block_structure"))) for s in spectra]
    if len(set(keys)) < len(keys):
        return [(number // 3, number % 3) for number in range(len(spectra))]
    rows, columns = sorted({center for center, _ in keys}), list(dict.fromkeys(name for _, name in keys))
    return [(rows.index(center), columns.index(name)) for center, name in keys]


def _eigenvalues(spectrum: Spectrum) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(block.eigenvalues, block.above_floor) for block in spectrum.blocks.values()]


def panel(axis: Any, spectrum: Spectrum) -> None:
    """Draw the eigenvalues of every block on one matplotlib axis, with intervals where there are any."""
    facts = spectrum.metadata
    for number, (name, block) in enumerate(spectrum.blocks.items()):
        values = block.eigenvalues
        index = np.arange(1, len(values) + 1)
        colour = COLOURS[number % len(COLOURS)]
        style = STYLES[number // len(COLOURS) % len(STYLES)]
        above, below = block.above_floor, (~block.above_floor) & (values > 0)
        if spectrum.bootstrap is not None:
            band(axis, spectrum.bootstrap.blocks[name], block, colour)
        axis.loglog(index[above], values[above], color=colour, linestyle=style, linewidth=1.6, label=as_text(name))
        if below.any():
            axis.loglog(index[below], values[below], color=colour, linestyle=style, linewidth=0.8, alpha=0.25)
    kind = "gradient covariance" if facts.get("centered") else "empirical Fisher"
    partial = partial_prefix(spectrum).replace(": ", "\n")
    axis.set_title(f"{partial}{kind}, blocks: {as_text(structure_name(spectrum))}", fontsize=10)
    axis.set_xlabel("index")
    axis.grid(which="major", linewidth=0.4, alpha=0.5)
    if 1 < len(spectrum.blocks) <= 16:
        axis.legend(fontsize=7, ncols=2 if len(spectrum.blocks) > 6 else 1, frameon=False, loc="lower left")


def band(axis: Any, drawn: BlockBootstrap, block: BlockSpectrum, colour: str) -> None:
    """Shade the intervals of a block's eigenvalues, as far as resamples have so many above the noise floor."""
    inside = block.above_floor & (drawn.eigenvalue_low > block.noise_floor)
    index = np.arange(1, len(inside) + 1)[inside]
    low, high = drawn.eigenvalue_low[inside], drawn.eigenvalue_high[inside]
    axis.fill_between(index, low, high, color=colour, alpha=0.2, linewidth=0)
