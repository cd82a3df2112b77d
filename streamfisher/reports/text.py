"""Spectra for people: a table for the terminal and a picture of the eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import require
from streamfisher.results.spectrum import BlockSpectrum, Spectrum
from streamfisher.analysis.bootstrap import BlockBootstrap

_COLUMNS = ("block", "parameters", "trace", "largest", "gap", "condition", "eff. rank", "rank")
#: Okabe and Ito's colours, told apart by the colour-blind; line styles tell apart what repeats.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")


def table(spectrum: Spectrum) -> str:
    """Return the metrics of every block and of the whole as aligned text, with the facts that qualify them."""
    rows = [_row(block) for block in spectrum.blocks.values()]
    if len(rows) > 1:
        rows.append(_row(spectrum.global_))
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]
    lines = [title(spectrum), _line(_COLUMNS, widths), "  ".join("-" * width for width in widths)]
    lines += [_line(row, widths) for row in rows]
    error = spectrum.metadata.get("block_diagonal_error")
    if error is not None and len(spectrum.blocks) > 1:
        lines.append(f"Relative error of the block-diagonal approximation (Frobenius): {error:.3g}")
    projection = spectrum.metadata.get("projection")
    if projection is not None:
        error = spectrum.global_.error_bars["trace"] if spectrum.global_.error_bars else None
        known = "" if error is None else f", trace to {100 * error:.2g} %"
        lines.append(f"Estimated from random projections to {projection['numbers']} numbers (--project){known}")
    skipped = spectrum.metadata.get("skipped_samples") or {}
    if skipped:
        lines.append(f"Skipped, {len(skipped)} in all: sample {', '.join(list(skipped)[:8])}.")
    if spectrum.bootstrap is not None:
        lines += ["", *_intervals(spectrum)]
    return "\n".join(lines)


def _intervals(spectrum: Spectrum) -> list[str]:
    """Return a table of the intervals of the metrics that `table` shows."""
    found = spectrum.bootstrap
    assert found is not None  # asked for only where it is there
    columns = ("trace", "largest_eigenvalue", "spectral_gap", "condition_number", "effective_rank", "stable_rank")
    blocks = [*found.blocks.values(), *([found.global_] if len(found.blocks) > 1 else [])]
    rows: list[tuple[str, ...]] = [("block", *(name.replace("_", " ") for name in columns))]
    for block in blocks:
        intervals = [block.interval(name) for name in columns]
        rows.append((block.name, *("-" if i is None else f"{i.low:.4g} .. {i.high:.4g}" for i in intervals)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{100 * found.level:g} % intervals from {found.n_resamples} bootstrap resamples of the samples"]
    lines += [_line(row, widths) for row in rows]
    return [*lines, "Ranks come out lower in resamples, which have fewer distinct samples (docs/metrics.md)."]


def title(spectrum: Spectrum) -> str:
    """Return one line that says what the spectrum is of."""
    facts = spectrum.metadata
    kind = "Gradient covariance" if facts.get("centered") else "Empirical Fisher"
    return (
        f"{_partial(spectrum)}{kind}, blocks: {structure_name(spectrum)}, "
        f"N = {facts.get('n_samples')} {facts.get('sample_unit', 'sample')}s, {facts.get('normalization')}"
    )


def structure_name(spectrum: Spectrum) -> str:
    """Return the name of the block structure; `own` for patterns of the user's own."""
    structure = spectrum.metadata.get("block_structure")
    return "own" if isinstance(structure, dict) else str(structure)


def _partial(spectrum: Spectrum) -> str:
    facts = spectrum.metadata
    if not facts.get("partial"):
        return ""
    return f"PARTIAL RUN ({facts.get('samples_collected')} of {facts.get('n_samples_stored')} samples): "


def picture(spectra: Sequence[Spectrum], path: str | Path) -> Path:
    """Draw the eigenvalues of every block against their index, log-log, one panel per spectrum.

    Eigenvalues below a block's noise floor are drawn faint: they are rounding.

    Args:
        spectra: one panel each.
        path: its suffix says which kind (.png, .svg, .pdf).

    Returns:
        The path.

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
    figure.savefig(path, dpi=130, metadata={"Software": None} if path.suffix == ".png" else None)
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
        axis.loglog(index[above], values[above], color=colour, linestyle=style, linewidth=1.6, label=name)
        if below.any():
            axis.loglog(index[below], values[below], color=colour, linestyle=style, linewidth=0.8, alpha=0.25)
    kind = "gradient covariance" if facts.get("centered") else "empirical Fisher"
    partial = _partial(spectrum).replace(": ", "\n")
    axis.set_title(f"{partial}{kind}, blocks: {structure_name(spectrum)}", fontsize=10)
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


def _row(block: BlockSpectrum) -> tuple[str, ...]:
    metrics = block.metrics
    return (
        block.name,
        f"{block.n_params:,}",
        _number(block.trace),
        _number(metrics["largest_eigenvalue"]),
        _number(metrics["spectral_gap"]),
        _number(metrics["condition_number"]),
        "-" if metrics["effective_rank"] is None else f"{metrics['effective_rank']:.1f}",
        "-" if metrics["numerical_rank"] is None else f"{metrics['numerical_rank']}/{metrics['n_eigenvalues']}",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        f"{cells[0]:<{widths[0]}}",
        *(f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)),
    )
    return "  ".join([first, *rest])
