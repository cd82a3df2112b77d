"""Spectra for people: a table for the terminal and a picture of the eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import require
from streamfisher.spectrum import BlockSpectrum, Spectrum

_COLUMNS = ("block", "parameters", "trace", "largest", "gap", "condition", "eff. rank", "rank")
#: Okabe and Ito's colours, told apart by the colour-blind; line styles tell apart what repeats.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")


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
    skipped = spectrum.metadata.get("skipped_samples") or {}
    if skipped:
        lines.append(f"{len(skipped)} samples were skipped: {', '.join(list(skipped)[:8])}.")
    return "\n".join(lines)


def title(spectrum: Spectrum) -> str:
    """Return one line that says what the spectrum is of."""
    facts = spectrum.metadata
    kind = "Gradient covariance" if facts.get("centered") else "Empirical Fisher"
    return (
        f"{kind}, blocks: {facts.get('block_structure')}, "
        f"N = {facts.get('n_samples')} {facts.get('sample_unit', 'sample')}s, {facts.get('normalization')}"
    )


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

    columns = min(3, len(spectra))
    rows = -(-len(spectra) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.2 * columns, 4.2 * rows), squeeze=False, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(spectra) :]:
        axis.set_visible(False)
    for axis, spectrum in zip(axes.flat, spectra, strict=False):
        _panel(axis, spectrum)
    for axis in axes[:, 0]:
        axis.set_ylabel("eigenvalue")
    path = Path(path)
    figure.savefig(path, dpi=130, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)
    return path


def _panel(axis: Any, spectrum: Spectrum) -> None:
    facts = spectrum.metadata
    for number, (name, block) in enumerate(spectrum.blocks.items()):
        values = block.eigenvalues
        index = np.arange(1, len(values) + 1)
        colour = _COLOURS[number % len(_COLOURS)]
        style = _STYLES[number // len(_COLOURS) % len(_STYLES)]
        above, below = block.above_floor, (~block.above_floor) & (values > 0)
        axis.loglog(index[above], values[above], color=colour, linestyle=style, linewidth=1.6, label=name)
        if below.any():
            axis.loglog(index[below], values[below], color=colour, linestyle=style, linewidth=0.8, alpha=0.25)
    kind = "gradient covariance" if facts.get("centered") else "empirical Fisher"
    axis.set_title(f"{kind}, blocks: {facts.get('block_structure')}", fontsize=10)
    axis.set_xlabel("index")
    axis.grid(which="major", linewidth=0.4, alpha=0.5)
    if len(spectrum.blocks) <= 16:
        axis.legend(fontsize=7, ncols=2 if len(spectrum.blocks) > 6 else 1, frameon=False, loc="lower left")


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
