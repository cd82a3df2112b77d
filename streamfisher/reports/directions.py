"""Directions against leading eigenspaces, for people and other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamfisher.reports.export import Table, write_tables
from streamfisher.reports.samples import aligned, write_json_file
from streamfisher.results.directions import DirectionAnalysis
from streamfisher.runtime.printable import printable

_MOST = 20


def directions_text(found: DirectionAnalysis) -> str:
    """Return the share of each direction in the leading eigenvectors of each block as aligned text."""
    what = "covariance" if found.centered else "Fisher"
    lines = []
    for key, part in found.blocks.items():
        lines += [
            f"{key}: {len(part.eigenvalues)} leading eigenvectors of the {what}; a random direction would have "
            f"{part.expected_of_random:.2%}"
        ]
        head: tuple[str, ...] = () if part.standard_errors is None else ("+-",)
        rows: list[tuple[str, ...]] = [("direction", "share", "of the first", *head, "rounding")]
        for place, name in enumerate(found.directions[:_MOST]):
            first = float(part.shares[place, 0]) if part.shares.shape[1] else 0.0
            errors = part.standard_errors
            spread = () if errors is None else (f"{errors[place]:.2%}",)
            rows.append((name, f"{part.total[place]:.2%}", f"{first:.2%}", *spread, f"{part.rounding[place]:.0e}"))
        lines += aligned(rows)
        if len(found.directions) > _MOST:
            lines.append(f"  and {len(found.directions) - _MOST} more")
    left_out = found.metadata.get("update_left_out")
    if left_out:
        lines.append(f"Not of the run, and left out of the update: {', '.join(left_out[:8])}")
    return "\n".join(map(printable, lines))


def direction_table(found: DirectionAnalysis) -> Table:
    """Return a row per block and direction."""
    rows: list[dict[str, Any]] = []
    for key, part in found.blocks.items():
        for place, name in enumerate(found.directions):
            errors = part.standard_errors
            rows.append(
                {
                    "block": key,
                    "direction": name,
                    "k": len(part.eigenvalues),
                    "share": float(part.total[place]),
                    "standard_error": None if errors is None else float(errors[place]),
                    "rounding": float(part.rounding[place]),
                    "squared_norm": float(part.squared_norms[place]),
                    "expected_of_random": part.expected_of_random,
                }
            )
    return {name: [row[name] for row in rows] for name in rows[0]}


def export_directions(found: DirectionAnalysis, path: str | Path) -> list[Path]:
    """Write shares to a `.csv` or `.parquet` (a row per block and direction) or a `.json` (also of each eigenvector).

    Raises:
        ConfigError: the suffix is another.
        MissingExtraError: pyarrow is needed for Parquet and not installed.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        return write_json_file(found.to_dict(), path)
    return write_tables({"directions": direction_table(found)}, path)
