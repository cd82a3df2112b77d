"""Influence for people and other programs: the samples at both ends, and all scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import ConfigError
from streamfisher.reports.export import Table, write_tables
from streamfisher.reports.samples import about, aligned, shortened, write_json_file
from streamfisher.results.influence import Influence, Score
from streamfisher.results.metrics import json_values
from streamfisher.runtime.printable import printable

#: Queries that are shown one by one; more are shown by their mean.
_EACH = 4


def influence_text(found: Influence, count: int = 10, score: Score = "influence") -> str:
    """Return the samples with the highest and lowest scores as aligned text.

    Args:
        found: the scores.
        count: samples at each end.
        score: by which samples are ranked.
    """
    lines = [
        f"{len(found.queries)} queries against {len(found.samples)} samples, "
        f"{', '.join(map(printable, list(found.blocks)[:6]))}{', ...' if len(found.blocks) > 6 else ''}"
    ]
    for key in found.below_floor:
        lines.append(
            f"A damping lies below the noise floor of {printable(key)} ({found.blocks[key].noise_floor:.2g}): "
            "rounding decides."
        )
    for place in range(len(found.dampings) if score == "influence" else 1):
        what = {"inner": "inner product", "cosine": "cosine"}.get(score)
        unit = " times the mean eigenvalue" if found.relative else ""
        lines += ["", what or f"influence at a damping of {found.dampings[place]:.3g}{unit}"]
        every = range(len(found.queries)) if len(found.queries) <= _EACH else [None]
        for query in every:
            name = "mean of all queries" if query is None else f"query {found.queries[query]}"
            if query is not None and found.query_texts is not None:
                name += f" ({shortened(found.query_texts[query])})"
            for lowest in (False, True):
                ranked = found.top(query, count, score=score, damping=place, lowest=lowest)
                rows = [(f"{one['sample']}", f"{one['score']:+.4g}", *about(one)) for one in ranked]
                lines += [f"{name}, {'lowest' if lowest else 'highest'}", *aligned([("sample", "score"), *rows])]
    return "\n".join(map(printable, lines))


def influence_table(found: Influence, count: int = 10, score: Score = "influence") -> Table:
    """Return a row per query, damping, end and rank."""
    table: dict[str, list[Any]] = {
        name: [] for name in ("query", "damping", "end", "rank", "sample", "score", *sorted(found.fields), "text")
    }
    if found.texts is None:
        table.pop("text")
    for place in range(len(found.dampings) if score == "influence" else 1):
        for row, query in enumerate(found.queries.tolist()):
            for end in ("highest", "lowest"):
                ranked = found.top(row, count, score=score, damping=place, lowest=end == "lowest")
                for rank, one in enumerate(ranked):
                    known = {"query": query, "end": end, "rank": rank + 1}
                    known["damping"] = float(found.dampings[place]) if score == "influence" else None
                    for name, values in table.items():
                        values.append(known[name] if name in known else one[name])
    return table


def export_influence(found: Influence, path: str | Path, count: int = 10, score: Score = "influence") -> list[Path]:
    """Write influence to a file.

    - `.csv`, `.parquet`: the samples at both ends for each query and damping;
    - `.json`: the same, as `to_dict` gives it;
    - `.npz`: everything: `BLOCK/influence` (m, Q, n), `BLOCK/inner` (Q, n) and squared norms; `total/...` is of all
      blocks.

    Returns:
        The files that were written.

    Raises:
        ConfigError: the suffix is another.
        MissingExtraError: pyarrow is needed for Parquet and not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        return write_json_file(found.to_dict(count, score), path)
    if suffix in (".csv", ".parquet"):
        return write_tables({"influence": influence_table(found, count, score)}, path)
    if suffix != ".npz":
        raise ConfigError(f"{path}: the name must end in .csv, .parquet, .json or .npz.")
    arrays: dict[str, Any] = {"samples": found.samples, "queries": found.queries, "dampings": found.dampings}
    for key, part in {**found.blocks, "total": found.total}.items():
        arrays |= {
            f"{key}/influence": part.damped,
            f"{key}/inner": part.inner,
            f"{key}/dampings": part.dampings,
            f"{key}/squared_norms": part.squared_norms,
            f"{key}/query_squared_norms": part.query_squared_norms,
        }
    arrays["metadata"] = np.array(json.dumps(json_values(dict(found.metadata)), allow_nan=False))
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return [path]
