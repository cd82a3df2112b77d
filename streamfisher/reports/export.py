"""Spectra in other programs' formats: CSV, JSON, NPZ, Parquet, safetensors, and pandas frames.

Two tables say everything: `eigenvalues` has a row per eigenvalue, `metrics` a row per block. Every row names its block
structure and whether it is of the covariance, so tables of several spectra can be put together.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from streamfisher.errors import ConfigError, require
from streamfisher.results.metrics import SCALAR_METRICS, json_values
from streamfisher.results.notebook import UNION, WHOLE, structure_name
from streamfisher.results.spectrum import BlockSpectrum, Spectrum, write_spectra

Format = Literal["csv", "json", "npz", "parquet", "safetensors"]
FORMATS: tuple[str, ...] = get_args(Format)
Table = dict[str, list[Any]]  # column name -> values, all of one length

_FACTS = ("n_samples", "n_params", "n_eigenvalues", "noise_floor", "noise_floor_source", "truncated")
_MORE = (
    *("smallest_eigenvalue", "power_law_stderr", "power_law_r_squared", "power_law_first", "power_law_last"),
    *("solver", "solved_side", "jitter", "largest_residual", "reason"),  # the last two only some blocks have
)


def eigenvalue_table(spectra: Sequence[Spectrum]) -> Table:
    """Return a row per eigenvalue of each block, their union and the whole model: `index` counts from 1, descending."""
    table: Table = {
        name: []
        for name in ("structure", "centered", "block", "of", "index", "eigenvalue", "above_floor", "relative_error")
    }
    for spectrum in spectra:
        for what, block in _blocks(spectrum):
            count = len(block.eigenvalues)
            errors = block.relative_errors
            table["structure"] += [structure_name(spectrum)] * count
            table["centered"] += [bool(spectrum.metadata.get("centered"))] * count
            table["block"] += [block.name] * count
            table["of"] += [what] * count
            table["index"] += range(1, count + 1)
            table["eigenvalue"] += block.eigenvalues.tolist()
            table["above_floor"] += block.above_floor.tolist()
            table["relative_error"] += [float(error) if np.isfinite(error) else None for error in errors]
    return table


def metric_table(spectra: Sequence[Spectrum]) -> Table:
    """Return a row per block, one for their union and one for the whole model, with all metrics and intervals."""
    drawn = any(spectrum.bootstrap is not None for spectrum in spectra)
    rows = []
    for spectrum in spectra:
        for what, block in _blocks(spectrum):
            metrics = block.metrics
            row: dict[str, Any] = {
                "structure": structure_name(spectrum),
                "centered": bool(spectrum.metadata.get("centered")),
                "partial": bool(spectrum.metadata.get("partial")),
                "block": block.name,
                "of": what,
                **{name: metrics.get(name) for name in (*_FACTS, *SCALAR_METRICS, *_MORE)},
            }
            if drawn:
                row |= _interval_columns(spectrum, block)
            rows.append(row)
    return {name: [row[name] for row in rows] for name in rows[0]}


def to_frame(spectra: Spectrum | Sequence[Spectrum], table: Literal["metrics", "eigenvalues"] = "metrics") -> Any:
    """Return a pandas DataFrame of the `metrics` or the `eigenvalues` of one or more spectra.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    require("pandas", "tables", "make data frames")
    import pandas

    several = [spectra] if isinstance(spectra, Spectrum) else list(spectra)
    return pandas.DataFrame(metric_table(several) if table == "metrics" else eigenvalue_table(several))


def export(
    spectra: Sequence[Spectrum],
    path: str | Path,
    kind: Format,
    *,
    per_sample: Mapping[str, np.ndarray] | None = None,
) -> list[Path]:
    """Write spectra in another format.

    - `csv`, `parquet`: the metrics to `path`, the eigenvalues beside it as `NAME.eigenvalues.SUFFIX`;
    - `json`: what `Spectrum.to_json` writes, everything in one file;
    - `npz`, `safetensors`: arrays `STRUCTURE/BLOCK/eigenvalues` and `.../above_floor` (`STRUCTURE.centered` for
      covariances), the per-sample arrays, and all metrics and facts as JSON: under `metadata` in an NPZ (a string),
      in the header of a safetensors file.

    Args:
        spectra: at least one.
        path: of the file.
        kind: of the file.
        per_sample: (N,) arrays that go into `npz` and `safetensors`, for example losses.

    Returns:
        The files that were written.

    Raises:
        ConfigError: `kind` is unknown.
        MissingExtraError: pyarrow is needed for Parquet and not installed.
    """
    path = Path(path)
    beside = path.with_name(f"{path.stem}.eigenvalues{path.suffix}")
    if kind == "csv":
        _write_csv(metric_table(spectra), path)
        _write_csv(eigenvalue_table(spectra), beside)
        return [path, beside]
    if kind == "parquet":
        _write_parquet(metric_table(spectra), path)
        _write_parquet(eigenvalue_table(spectra), beside)
        return [path, beside]
    if kind == "json":
        return [write_spectra(spectra, path)]
    arrays = _arrays(spectra) | {f"samples/{name}": np.asarray(values) for name, values in (per_sample or {}).items()}
    contents = [json_values(_without_eigenvalues(spectrum.to_dict())) for spectrum in spectra]
    facts = json.dumps(contents, allow_nan=False)
    if kind == "npz":
        named: dict[str, Any] = {"metadata": np.array(facts), **arrays}
        with path.open("wb") as file:
            np.savez_compressed(file, **named)
        return [path]
    if kind == "safetensors":
        from safetensors.numpy import save_file

        contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        save_file(contiguous, str(path), metadata={"streamfisher": facts})
        return [path]
    raise ConfigError(f"--to {kind!r} is unknown; choose one of {', '.join(FORMATS)}.")


def write_tables(tables: Mapping[str, Table], path: str | Path) -> list[Path]:
    """Write tables as CSV or Parquet, by the suffix: the first to `path`, each other beside it as `NAME.KEY.SUFFIX`.

    Args:
        tables: what is in each -> itself.
        path: of the first, ending in .csv or .parquet.

    Returns:
        The files that were written.

    Raises:
        ConfigError: the suffix is neither.
        MissingExtraError: pyarrow is needed for Parquet and not installed.
    """
    path = Path(path)
    writers = {".csv": _write_csv, ".parquet": _write_parquet}
    write = writers.get(path.suffix.lower())
    if write is None:
        raise ConfigError(f"{path}: the name of a table must end in {' or '.join(writers)}.")
    files = []
    for place, (key, table) in enumerate(tables.items()):
        files.append(path if place == 0 else path.with_name(f"{path.stem}.{key}{path.suffix}"))
        write(table, files[-1])
    return files


def _blocks(spectrum: Spectrum) -> list[tuple[str, BlockSpectrum]]:
    """Return the blocks, their union under the key `global`, and the whole model, each with the word for what it is."""
    blocks = list(spectrum.reached.values())
    if [block.name for block in blocks] == ["global"]:
        return [(WHOLE, blocks[0])]
    rows = [("block", block) for block in blocks]
    rows.append((UNION if len(spectrum.blocks) > 1 else WHOLE, spectrum.global_))
    return rows if spectrum.solved_whole is None else [*rows, (WHOLE, spectrum.solved_whole)]


def _interval_columns(spectrum: Spectrum, block: BlockSpectrum) -> dict[str, float | None]:
    columns: dict[str, float | None] = {}
    for name in SCALAR_METRICS:
        found = None
        if spectrum.bootstrap is not None:
            drawn = spectrum.bootstrap.of(block.name)
            found = None if drawn is None else drawn.interval(name)
        columns[f"{name}_low"] = None if found is None else found.low
        columns[f"{name}_high"] = None if found is None else found.high
    return columns


def _arrays(spectra: Sequence[Spectrum]) -> dict[str, np.ndarray]:
    arrays = {}
    for spectrum in spectra:
        prefix = structure_name(spectrum) + (".centered" if spectrum.metadata.get("centered") else "")
        for _, block in _blocks(spectrum):
            arrays[f"{prefix}/{block.name}/eigenvalues"] = block.eigenvalues
            arrays[f"{prefix}/{block.name}/above_floor"] = block.above_floor
    return arrays


def _without_eigenvalues(content: dict[str, Any]) -> dict[str, Any]:
    per_block = {
        name: {key: value for key, value in block.items() if key != "eigenvalues"}
        for name, block in content["per_block"].items()
    }
    of_all = {
        name: block and {key: value for key, value in block.items() if key != "eigenvalues"}
        for name in ("global", "whole_model")
        for block in [content[name]]
    }
    return {**content, **of_all, "per_block": per_block}


def _write_csv(table: Table, path: Path) -> None:
    """Write numbers so that reading them gives the same float64; what is undefined stays empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        for row in zip(*table.values(), strict=True):
            writer.writerow([_cell(value) for value in row])


def _cell(value: Any) -> Any:
    """Return what is written for a value; a name that a spreadsheet would take for a formula is made text."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return "'" + value
    return "" if value is None else repr(value) if isinstance(value, float) else value


def _write_parquet(table: Table, path: Path) -> None:
    require("pyarrow", "tables", "write Parquet")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(table), path)
