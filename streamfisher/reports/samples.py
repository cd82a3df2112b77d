"""What is known of single samples, for people and other programs: tables for the terminal, for CSV and for Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import ConfigError
from streamfisher.reports.export import Table, write_tables
from streamfisher.results.samples import LooMetric, SampleAnalysis
from streamfisher.runtime.durable import replacing
from streamfisher.runtime.printable import printable

_TEXT = 48
_METRICS: tuple[LooMetric, ...] = ("largest_eigenvalue", "trace", "effective_rank")


def samples_text(found: SampleAnalysis, carriers: int = 3, count: int = 10) -> str:
    """Return what stands out among the samples of a block as aligned text.

    Args:
        found: the analysis.
        carriers: samples that are named of each eigenvector.
        count: samples of each other list.
    """
    what = "covariance" if found.centered else "Fisher"
    lines = [f"{printable(found.block)}: {what} of {len(found.samples)} samples, {found.n_params:,} parameters"]
    lines += ["", f"{len(found.eigenvalues)} leading eigenvectors, and the samples that carry them"]
    rows: list[tuple[str, ...]] = [("", "eigenvalue", "carried by", "sample", "share", "loading")]
    for index, value in enumerate(found.eigenvalues):
        by = "1 sample" if found.is_outlier[index] else f"{found.participation[index]:.1f} samples"
        for place, one in enumerate(found.carriers(index, carriers)):
            head: tuple[str, str, str] = (f"{index + 1}", f"{value:.4g}", by) if place == 0 else ("", "", "")
            rows.append((*head, f"{one['sample']}", f"{one['share']:.1%}", f"{one['loading']:+.3f}", *about(one)))
    lines += aligned(rows)
    for place, damping in enumerate(found.dampings):
        dimension = found.effective_dimensions[place]
        highest = ", ".join(
            f"{one['sample']} ({one['leverage']:.3f})" for one in found.most_leveraged(place, min(count, 5))
        )
        title = "\nLeverage at a damping of\n" if place == 0 else ""
        lines.append(f"{title}  {damping:.3g}: effective dimension {dimension:.1f}; highest: {highest}")
    for metric in _METRICS if found.without is not None else ():
        moved: list[tuple[str, ...]] = [("sample", "without", "change")]
        moved += [
            (f"{one['sample']}", f"{one[metric]:.4g}", f"{one['change']:+.2%}", *about(one))
            for one in found.most_moving(metric, min(count, 5))
        ]
        whole = found.without.whole[metric] if found.without is not None else 0.0
        lines += ["", f"Moved most by leaving out one sample: {metric.replace('_', ' ')}, {whole:.4g}"]
        lines += aligned(moved)
    if found.metadata.get("by_tiles"):
        said = (
            "The Gram does not fit the memory budget and was read by tiles: leverage scores and metrics without single "
        )
        lines += ["", said + "samples, which take all eigenvectors, are left out."]
    lines += ["", *_duplicates(found, count)]
    return "\n".join(line if line.startswith("\n") else printable(line) for line in lines)


def _duplicates(found: SampleAnalysis, count: int) -> list[str]:
    if not found.n_pairs:
        return [f"No two gradients have a cosine of {found.threshold:g} or more."]
    lines = [f"{found.n_pairs} pairs of gradients have a cosine of {found.threshold:g} or more:"]
    shown = zip(found.pairs[:count].tolist(), found.pair_cosines[:count], strict=False)
    lines += [f"  {i} and {j}: {cosine:.6f}" for (i, j), cosine in shown]
    large = [members for members in found.clusters if len(members) > 2][:count]
    lines += [
        f"  {len(members)} alike: {', '.join(map(str, members[:8]))}{', ...' if len(members) > 8 else ''}"
        for members in large
    ]
    return lines


def about(one: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the last cells of a row: input and class of one of several samples of an input, and snippet or loss."""
    of_class: tuple[str, ...] = ()
    if "input" in one and "class" in one:
        of_class = (f"input {one['input']:.0f}, class {one['class']:.0f}",)
    if "text" in one:
        return (*of_class, shortened(one["text"]))
    return (*of_class, f"loss {one['loss']:.4g}") if "loss" in one else of_class


def shortened(text: str) -> str:
    """Return what a sample says as it fits into a table."""
    text = printable(text)
    return text if len(text) <= _TEXT else text[: _TEXT - 3] + "..."


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of right-aligned cells; what comes after those of the first row is put to the left."""
    columns = len(rows[0])
    widths = [max(len(row[place]) for row in rows) for place in range(columns)]
    lines = []
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join(["", *cells, *row[columns:]]).rstrip())
    return lines


def sample_table(found: SampleAnalysis) -> Table:
    """Return a row per sample: number, fields, norm, cluster, leverages, leave-one-out metrics, loadings."""
    table: Table = {"sample": found.samples.tolist()}
    table |= {name: _cells(values) for name, values in found.fields.items()}
    if found.texts is not None:
        table["text"] = list(found.texts)
    table["squared_norm"] = _cells(found.squared_norms)
    table["cluster"] = [int(number) if number >= 0 else None for number in found.cluster]
    table |= {
        f"leverage_{damping:.6g}": _cells(row) for damping, row in zip(found.dampings, found.leverages, strict=True)
    }
    if found.without is not None:
        table |= {f"{metric}_without": _cells(getattr(found.without, metric)) for metric in _METRICS}
    return table | {f"loading_{k + 1}": _cells(found.loadings[:, k]) for k in range(found.loadings.shape[1])}


def _cells(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def export_samples(found: SampleAnalysis, path: str | Path) -> list[Path]:
    """Write an analysis of samples to a file.

    - `.csv`, `.parquet`: a row per sample to `path`; beside it `NAME.eigenvectors.SUFFIX` with a row per eigenvector
      and `NAME.pairs.SUFFIX` with a row per pair of near-duplicates;
    - `.json`: what stands out, as `to_dict` gives it.

    Returns:
        The files that were written.

    Raises:
        ConfigError: the suffix is another.
        MissingExtraError: pyarrow is needed for Parquet and not installed.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return write_json_file(found.to_dict(), path)
    eigenvectors: Table = {
        "block": [found.block] * len(found.eigenvalues),
        "index": list(range(1, len(found.eigenvalues) + 1)),
        "eigenvalue": _cells(found.eigenvalues),
        "participation": _cells(found.participation),
        "largest_share": _cells(found.shares.max(axis=0, initial=0.0)),
    }
    pairs: Table = {
        "sample": found.pairs[:, 0].tolist(),
        "other": found.pairs[:, 1].tolist(),
        "cosine": _cells(found.pair_cosines),
    }
    return write_tables({"samples": sample_table(found), "eigenvectors": eigenvectors, "pairs": pairs}, path)


def write_json_file(content: Mapping[str, Any], path: Path) -> list[Path]:
    """Write plain values as strict JSON.

    Raises:
        ConfigError: the name ends in something else than .json.
    """
    if path.suffix.lower() != ".json":
        raise ConfigError(f"{path}: the name must end in .json.")
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [path]
