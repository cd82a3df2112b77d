"""Spectra for people: a table for the terminal and a picture of the eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence

from streamfisher.results.notebook import Block, table_rows, title, union_note
from streamfisher.results.spectrum import Spectrum
from streamfisher.runtime.printable import printable

_COLUMNS = ("block", "parameters", "trace", "largest", "gap", "condition", "eff. rank", "rank")


def table(spectrum: Spectrum) -> str:
    """Return the metrics of every block and of the whole as aligned text, with the facts that qualify them."""
    rows = [_row(name, block) for name, block in table_rows(spectrum)]
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]
    lines = [title(spectrum), _line(_COLUMNS, widths), "  ".join("-" * width for width in widths)]
    lines += [_line(row, widths) for row in rows]
    note = union_note(spectrum)
    if note is not None:
        lines.append(f"{note}.")
    error = spectrum.metadata.get("block_diagonal_error")
    if error is not None and len(spectrum.blocks) > 1:
        lines.append(f"Relative error of the block-diagonal approximation (Frobenius): {error:.3g}")
    projection = spectrum.metadata.get("projection")
    if projection is not None:
        error = spectrum.global_.error_bars["trace"] if spectrum.global_.error_bars else None
        known = "" if error is None else f", trace to {100 * error:.2g} %"
        lines.append(f"Estimated from random projections to {projection['numbers']} numbers (--project){known}")
    unreached = spectrum.metadata.get("parameters_without_gradient") or []
    if unreached:
        more = f" and {len(unreached) - 8} more" if len(unreached) > 8 else ""
        lines.append(f"No gradient in any sample: {', '.join(unreached[:8])}{more}.")
    skipped = spectrum.metadata.get("skipped_samples") or {}
    if skipped:
        lines.append(f"Skipped, {len(skipped)} in all: sample {', '.join(list(skipped)[:8])}.")
    if spectrum.bootstrap is not None:
        lines += ["", *_intervals(spectrum)]
    return "\n".join(map(printable, lines))


def _intervals(spectrum: Spectrum) -> list[str]:
    """Return a table of the intervals of the metrics that `table` shows."""
    found = spectrum.bootstrap
    assert found is not None  # asked for only where it is there
    columns = ("trace", "largest_eigenvalue", "spectral_gap", "effective_rank", "stable_rank", "participation_ratio")
    rows_of = [(name, found.of(block.name)) for name, block in table_rows(spectrum)]
    rows: list[tuple[str, ...]] = [("block", *(name.replace("_", " ") for name in columns))]
    for row_name, drawn in rows_of:
        intervals = [None if drawn is None else drawn.interval(name) for name in columns]
        rows.append((printable(row_name), *("-" if i is None else f"{i.low:.4g} .. {i.high:.4g}" for i in intervals)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    subsets = f"{found.n_resamples} subsets that lack {found.n_left_out} samples"
    lines = [f"{100 * found.level:g} % intervals at this N, from {subsets}"]
    lines += [_line(row, widths) for row in rows]
    lines.append("Delete-d jackknife; what still grows with N is not converged by it (see the page on metrics).")
    return [*lines, f"Beware: {found.heavy_tailed}."] if found.heavy_tailed else lines


def _row(name: str, block: Block) -> tuple[str, ...]:
    metrics = block.metrics
    return (
        printable(name),
        f"{block.n_params:,}",
        _number(metrics["trace"]),
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
