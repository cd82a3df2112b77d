"""Maps of layers by kinds of modules: which part of which layer carries what, as coloured tables."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from streamfisher.analysis.alignment import align
from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.subset_sums import SubsetSums
from streamfisher.blocks.structures import layer_key, module_key
from streamfisher.results.analyses import Alignment
from streamfisher.results.spectrum import Spectrum
from streamfisher.runtime.stage_progress import steps
from streamfisher.solving.solve import add

_KINDS = ("embedding", "normalization", "attention", "mlp", "output", "other")
#: Of more samples, cells are not solved: one eigensolve for each would take minutes.
_MOST_SOLVED = 1024


#: Trace of each cell, and its second metric.
Cells = dict[str, tuple[float, float | None]]


def cells_and_alignment(grams: BlockGrams, sums: SubsetSums | None) -> tuple[Cells | None, Alignment]:
    """Return the alignment of the layers and, where their cells are not solved, what the maps show of each.

    Grams of many samples take long to read, and are read once for all.

    Args:
        grams: of the layers.
        sums: filled on the way.
    """
    if len(grams.selection) <= _MOST_SOLVED:
        return None, align(grams)
    within, found = _within(grams), Cells()
    of_layer: dict[str, list[str]] = {}
    for cell in within.blocks:
        of_layer.setdefault(cell.rsplit("/", 1)[0], []).append(cell)

    def read(name: str) -> np.ndarray:
        gram = grams.gram_of(name)
        if sums is not None:
            sums.take(name, gram)
        return gram

    noting = dataclasses.replace(within, gram_of=read)
    aligned = align(grams, lambda layer: add(_seen(noting, cell, found) for cell in of_layer[layer]))
    return found, aligned


def _within(grams: BlockGrams) -> BlockGrams:
    """Return the same Grams by layers and kinds of modules."""
    cells = {name: f"{grams.assignment[name]}/{_kind(name)}" for name in grams.parameters}
    return dataclasses.replace(grams, assignment=cells)


def _seen(grams: BlockGrams, cell: str, found: Cells) -> np.ndarray:
    """Return the matrix of a cell, once its trace and participation ratio are noted: sums over its entries."""
    K = grams.gram(cell)
    trace, norm = float(np.trace(K)) / len(K), float(np.linalg.norm(K)) / len(K)
    found[cell] = (trace, (trace / norm) ** 2 if norm > 0 else None)
    return K


def layer_maps(grams: BlockGrams, unsolved: Cells | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Return trace and effective rank of every layer's kinds of modules, for the template, and what to know of them.

    Of more than 1,024 samples it is the participation ratio instead of the effective rank: it needs no eigenvalues.

    Args:
        grams: of the layers.
        unsolved: what `cells_and_alignment` found, where it did.
    """
    from matplotlib.colors import LogNorm, Normalize

    within = _within(grams)
    cells = within.assignment
    rows = list(dict.fromkeys(grams.assignment[name] for name in grams.parameters))
    columns = [kind for kind in _KINDS if any(cell.endswith("/" + kind) for cell in cells.values())]
    solved = len(grams.selection) <= _MOST_SOLVED
    found = _solved(within.spectrum()) if solved else _unsolved(within) if unsolved is None else unsolved
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


def _solved(spectrum: Spectrum) -> Cells:
    return {cell: (block.trace, block.metrics["effective_rank"]) for cell, block in spectrum.blocks.items()}


def _unsolved(grams: BlockGrams) -> Cells:
    found = Cells()
    for cell in steps(list(grams.blocks), "layers and modules", show=grams.progress, n_samples=len(grams.selection)):
        _seen(grams, cell, found)
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
