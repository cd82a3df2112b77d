"""Maps of layers by kinds of modules: which part of which layer carries what, as coloured tables."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.blocks.structures import layer_key, module_key
from streamfisher.results.spectrum import Spectrum

_KINDS = ("embedding", "normalization", "attention", "mlp", "output", "other")
#: Of more samples, cells are not solved: one eigensolve for each would take minutes.
_MOST_SOLVED = 1024


def layer_maps(grams: BlockGrams) -> tuple[list[dict[str, Any]], list[str]]:
    """Return trace and effective rank of every layer's kinds of modules, for the template, and what to know of them.

    Of more than 1,024 samples it is the participation ratio instead of the effective rank: it needs no eigenvalues.
    """
    from matplotlib.colors import LogNorm, Normalize

    layers = {name: grams.assignment[name] for name in grams.parameters}  # layer keys, prefixed where needed
    cells = {name: f"{layers[name]}/{_kind(name)}" for name in grams.parameters}
    within = dataclasses.replace(grams, assignment=cells)
    rows = list(dict.fromkeys(layers.values()))
    columns = [kind for kind in _KINDS if any(cell.endswith("/" + kind) for cell in cells.values())]
    solved = len(grams.selection) <= _MOST_SOLVED
    found = _solved(within.spectrum()) if solved else _unsolved(within)
    second = "effective rank" if solved else "participation ratio"
    maps = []
    for place, label in enumerate(("trace", second)):
        matrix = np.full((len(rows), len(columns)), np.nan)
        for cell, values in found.items():
            layer, kind = cell.rsplit("/", 1)
            value = values[place]
            matrix[rows.index(layer), columns.index(kind)] = np.nan if value is None else value
        positive = matrix[matrix > 0]
        if positive.size:
            norm = (LogNorm if place == 0 else Normalize)(float(positive.min()), float(positive.max()))
            maps.append(_map(label, rows, columns, matrix, norm))
    notes = ["Darker is less. The trace is on a logarithmic scale; of a cell without parameters nothing is shown."]
    if not solved:
        notes.append(
            f"The participation ratio stands for the effective rank, which {len(cells)} eigensolves would give."
        )
    return maps, notes


def _kind(name: str) -> str:
    return module_key(name) if layer_key(name) != "embedding" else "embedding"


def _solved(spectrum: Spectrum) -> dict[str, tuple[float, float | None]]:
    return {cell: (block.trace, block.metrics["effective_rank"]) for cell, block in spectrum.blocks.items()}


def _unsolved(grams: BlockGrams) -> dict[str, tuple[float, float | None]]:
    """Return trace and participation ratio of each block: sums over the entries of its Gram."""
    found: dict[str, tuple[float, float | None]] = {}
    for cell in grams.blocks:
        K = grams.gram(cell)
        trace, norm = float(np.trace(K)) / len(K), float(np.linalg.norm(K)) / len(K)
        found[cell] = (trace, (trace / norm) ** 2 if norm > 0 else None)
    return found


def _map(label: str, rows: list[str], columns: list[str], matrix: np.ndarray, norm: Any) -> dict[str, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colours = colormaps["cividis"]

    def cell(value: float, column: str) -> dict[str, str] | None:
        if not value > 0:
            return None
        place = float(norm(value))
        ink = "#fff" if place < 0.55 else "#000"
        fill = to_hex(colours(place))
        return {"fill": fill, "ink": ink, "text": f"{value:.3g}", "value": f"{value:.6g}", "column": column}

    shown = [
        (name, [cell(float(value), column) for value, column in zip(values, columns, strict=True)])
        for name, values in zip(rows, matrix, strict=True)
    ]
    return {"label": label, "columns": columns, "rows": shown}
