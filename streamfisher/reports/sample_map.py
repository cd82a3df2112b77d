"""The samples of a run on a page: a map by two loadings, and a table of those that matter most."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.run import StoredRun
from streamfisher.errors import CapacityError, RunError
from streamfisher.reports.samples import shortened
from streamfisher.results.samples import LooMetric, SampleAnalysis
from streamfisher.results.spectrum import WHOLE_MODEL
from streamfisher.runtime.printable import printable

#: Eigenvectors to choose the axes among.
_VECTORS = 6
#: Of more samples there is no map: their eigenvectors take more than a few seconds.
_MOST_SAMPLES = 4096
#: Of more samples, those with the largest loadings are drawn.
_MOST_DRAWN = 1500
_ROWS = 15
_METRICS: tuple[LooMetric, ...] = ("largest_eigenvalue", "trace", "effective_rank")


def sample_map(run: StoredRun, grams: BlockGrams) -> dict[str, Any]:
    """Return what the template of the samples shows of the whole model.

    Args:
        run: whose fields and texts are shown.
        grams: samples, weights and centering; blocks do not matter.
    """
    nothing: dict[str, Any] = {"note": "", "dots": [], "eigenvalues": [], "columns": [], "rows": []}
    n = len(grams.selection)
    if n > _MOST_SAMPLES:
        where = f"streamfisher samples {run.path.name}"
        return nothing | {"note": f"Of more than {_MOST_SAMPLES:,} samples no map is drawn; {where} takes its time."}
    try:
        run.require_exact("a map of samples", grams.config)
        found = run.samples_of(grams.together(), WHOLE_MODEL, _VECTORS)
    except (RunError, CapacityError) as error:
        return nothing | {"note": f"There is no map: {error}"}
    if not len(found.eigenvalues):
        return nothing | {"note": "No eigenvalue of the whole model lies above its noise floor."}
    columns, rows = _table(found)
    return {
        "note": _note(found),
        "dots": _dots(found),
        "eigenvalues": [f"{value:.3g}" for value in found.eigenvalues],
        "columns": columns,
        "rows": rows,
    }


def _note(found: SampleAnalysis) -> str:
    outliers = np.flatnonzero(found.is_outlier)
    said = f"Of the {len(found.eigenvalues)} leading eigenvectors "
    said += (
        f"{', '.join(str(index + 1) for index in outliers)} {'is' if len(outliers) == 1 else 'are'} carried by one "
        "sample for more than half."
        if len(outliers)
        else "none is carried by one sample for more than half."
    )
    if found.n_pairs:
        said += f" {found.n_pairs:,} pairs of gradients have a cosine of {found.threshold:g} or more."
    if len(found.samples) > _MOST_DRAWN:
        said += f" Drawn are the {_MOST_DRAWN:,} samples with the largest loadings."
    return said


def _dots(found: SampleAnalysis) -> list[dict[str, Any]]:
    """Return a place, a colour, a text and the loadings of each sample that is drawn."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    most = np.maximum(np.abs(found.loadings).max(axis=0), np.finfo(float).tiny)
    order = np.argsort(-(np.abs(found.loadings) / most).max(axis=1), kind="stable")[:_MOST_DRAWN]
    losses = found.fields["loss"]
    low, high = np.nanmin(losses), np.nanmax(losses)
    shades = (losses - low) / (high - low) if high > low else np.zeros(len(losses))
    scaled = found.loadings / most
    second = min(1, scaled.shape[1] - 1)
    return [
        {
            "x": f"{200 + 180 * scaled[place, 0]:.1f}",
            "y": f"{150 - 135 * scaled[place, second]:.1f}",
            "fill": to_hex(colormaps["cividis"](float(np.nan_to_num(shades[place])))),
            "title": _title(found, int(place)),
            "loadings": " ".join(f"{value:.4g}" for value in found.loadings[place]),
        }
        for place in order
    ]


def _title(found: SampleAnalysis, place: int) -> str:
    """Return what the pointer on a sample says."""
    fields = {name: float(values[place]) for name, values in found.fields.items() if name != "n_targets"}
    about = ", ".join(f"{printable(name)} {value:.4g}" for name, value in fields.items())
    said = "" if found.texts is None else f"\n{printable(found.texts[place])}"
    return f"sample {found.samples[place]}: {about}{said}"


def _table(found: SampleAnalysis) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Return the columns and rows of the samples whose removal moves a metric most, each cell with its value."""
    columns = ["sample", "loss", "squared norm", "largest share"]
    parts = [found.fields["loss"], found.squared_norms, found.shares.max(axis=1)]
    if len(found.dampings):
        middle = len(found.dampings) // 2
        columns.append(f"leverage at {found.dampings[middle]:.2g}")
        parts.append(found.leverages[middle])
    moved = np.zeros((0, len(found.samples)))
    if found.without is not None:
        moved = np.stack([np.nan_to_num(found.without.change(metric)) for metric in _METRICS])
        columns += [f"{metric.replace('_', ' ')} without it" for metric in _METRICS]
    rank = np.abs(moved).max(axis=0) if len(moved) else found.squared_norms
    rows = []
    for place in np.argsort(-rank, kind="stable")[:_ROWS]:
        number = str(found.samples[place])
        name = number if found.texts is None else f"{number}: {shortened(found.texts[place])}"
        cells = [(name, number)]
        cells += [(f"{values[place]:.4g}", repr(float(values[place]))) for values in parts]
        cells += [(f"{change[place]:+.2%}", repr(float(change[place]))) for change in moved]
        rows.append(cells)
    return columns, rows
