"""How results show themselves in a notebook, and the pieces of HTML that the page shares."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np

#: What rows of the block-diagonal matrix and of the full one are called.
UNION, WHOLE = "union of blocks", "whole model"

_ROWS = 40
_COLUMNS = {
    "trace": "trace",
    "largest_eigenvalue": "largest",
    "spectral_gap": "gap",
    "condition_number": "condition",
    "effective_rank": "eff. rank",
    "stable_rank": "stable rank",
    "participation_ratio": "part. ratio",
    "cumulative_variance_10": "in top 10",
    "power_law_exponent": "tail exponent",
    "numerical_rank": "rank",
}


class Block(Protocol):
    """One row of a table, or one line of a picture."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def n_params(self) -> int: ...  # noqa: D102
    @property
    def n_samples(self) -> int: ...  # noqa: D102
    @property
    def metrics(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def eigenvalues(self) -> np.ndarray: ...  # noqa: D102
    @property
    def above_floor(self) -> np.ndarray: ...  # noqa: D102
    @property
    def noise_floor(self) -> float: ...  # noqa: D102
    @property
    def trace(self) -> float: ...  # noqa: D102


class ShownIntervals(Protocol):
    """What is shown of intervals."""

    def of(self, name: str) -> Any: ...  # noqa: D102


class Shown(Protocol):
    """What is shown of a spectrum."""

    @property
    def blocks(self) -> Mapping[str, Block]: ...  # noqa: D102
    @property
    def reached(self) -> Mapping[str, Block]: ...  # noqa: D102
    @property
    def global_(self) -> Block: ...  # noqa: D102
    @property
    def whole(self) -> Block | None: ...  # noqa: D102
    @property
    def metadata(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def bootstrap(self) -> ShownIntervals | None: ...  # noqa: D102


class ShownRun(Protocol):
    """What is shown of a run."""

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def manifest(self) -> Any: ...  # noqa: D102
    @property
    def parameters(self) -> Mapping[str, int]: ...  # noqa: D102
    def info(self) -> Mapping[str, Any]: ...  # noqa: D102


def title(spectrum: Shown) -> str:
    """Return one line that says what the spectrum is of."""
    facts = spectrum.metadata
    kind = "Gradient covariance" if facts.get("centered") else "Empirical Fisher"
    return (
        f"{partial_prefix(spectrum)}{kind}, blocks: {structure_name(spectrum)}, "
        f"N = {facts.get('n_samples')} {facts.get('sample_unit', 'sample')}s, {facts.get('normalization')}"
    )


def structure_name(spectrum: Shown) -> str:
    """Return the name of the block structure; `own` for patterns of the user's own."""
    structure = spectrum.metadata.get("block_structure")
    return "own" if isinstance(structure, dict) else str(structure)


def table_rows(spectrum: Shown) -> list[tuple[str, Block]]:
    """Return what a table has a row of, with its name: the blocks, their union, and the whole model.

    The union is the block-diagonal matrix: of more than N eigenvalues, and no rank of N samples. A block that is all
    there is has no row of its own beside the whole.
    """
    rows = [(block.name, block) for block in spectrum.reached.values()]
    if len(spectrum.blocks) < 2:
        return [(WHOLE if name == "global" else name, block) for name, block in rows]
    rows.append((UNION, spectrum.global_))
    return rows if spectrum.whole is None else [*rows, (WHOLE, spectrum.whole)]


def union_note(spectrum: Shown) -> str | None:
    """What to know of the last rows of a table; `None` where there are no blocks to unite."""
    if len(spectrum.blocks) < 2:
        return None
    n = spectrum.global_.metrics["n_samples"]
    note = f"{UNION}: the block-diagonal matrix, which may have a rank above N = {n}; "
    if spectrum.whole is None:
        return note + f"{WHOLE}: not solved here, --blocks none does"
    return note + f"{WHOLE}: all parameters in one matrix"


def partial_prefix(spectrum: Shown) -> str:
    """What a title begins with where not all samples were collected."""
    facts = spectrum.metadata
    if not facts.get("partial"):
        return ""
    return f"PARTIAL RUN ({facts.get('samples_collected')} of {facts.get('n_samples_stored')} samples): "


@functools.cache
def templates(package: str) -> jinja2.Environment:
    """The HTML templates of a room: all that is put into them is escaped, unless they say `safe`."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def metrics_table(spectrum: Shown) -> str:
    """The metrics of every block and of the whole as an HTML table, with intervals where there are any."""
    columns = ["block", "parameters", *_COLUMNS.values()]
    rows = [_row(spectrum, name, block) for name, block in table_rows(spectrum)]
    return _rendered("metrics.html", columns=columns, rows=rows, note=union_note(spectrum))


def spectrum_html(spectrum: Shown) -> str:
    """What a notebook shows of a spectrum."""
    error = spectrum.metadata.get("block_diagonal_error")
    error = f"{error:.3g}" if error is not None and len(spectrum.blocks) > 1 else None
    return _rendered("spectrum.html", title=title(spectrum), table=metrics_table(spectrum), error=error)


def result_html(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """What a notebook shows of any other result: a title and a table, numbers with four digits, 40 rows at most."""
    cells = [[_shown(value) for value in row] for row in rows[:_ROWS]]
    return _rendered("result.html", title=title, columns=columns, rows=cells, more=max(len(rows) - _ROWS, 0))


def _shown(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def run_html(run: ShownRun) -> str:
    """What a notebook shows of a run."""
    return _rendered("run.html", path=run.path, facts=fact_table(run_facts(run)))


def run_facts(run: ShownRun) -> dict[str, Any]:
    """What is known of a run, for people."""
    manifest, info = run.manifest, run.info()
    probe = manifest.probe
    described = manifest.data.get("description")
    described = described.get("data") if isinstance(described, Mapping) else described
    return {
        "model": f"{manifest.model['class']}, {manifest.model['n_params']:,} parameters",
        "model fingerprint": manifest.model["fingerprint"],
        "data": described or "not described",
        "data fingerprint": manifest.data["fingerprint"],
        "N": f"{info['samples_done']} of {info['n_samples']} {manifest.data['sample_unit']}s collected",
        "skipped samples": ", ".join(f"{k}: {v}" for k, v in info["skipped"].items()) or "none",
        "captured": f"{len(run.parameters)} tensors, {sum(run.parameters.values()):,} parameters",
        "excluded": "; ".join(f"{name}: {reason}" for name, reason in manifest.excluded.items()) or "nothing",
        "loss": f"{manifest.loss.get('loss')}: {manifest.loss.get('loss_reduction')}",
        "labels": manifest.config.get("labels"),
        "rows": f"computed in {manifest.layout['dtype_row']}, stored in {manifest.layout['dtype_store']}"
        + (", centered" if manifest.layout["centered"] else ""),
        "probe": f"worst relative error {probe['worst_error']:.1e} against plain autograd on {probe['n_samples']} "
        f"samples; {probe['coverage_parameters']:.2%} of the trainable parameters captured"
        if probe.get("worst_error") is not None
        else "not run",
        "collected with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }


def fact_table(facts: Mapping[str, Any]) -> str:
    """Names and values as an HTML table."""
    return _rendered("facts.html", facts=facts)


def _rendered(template: str, **values: Any) -> str:
    return templates("streamfisher.results").get_template(template).render(values)


def _row(spectrum: Shown, name: str, block: Block) -> dict[str, Any]:
    drawn = None if spectrum.bootstrap is None else spectrum.bootstrap.of(block.name)
    cells: list[tuple[str, str, Any, tuple[str, str] | None]] = []
    metrics = block.metrics
    for metric, label in _COLUMNS.items():
        value = metrics[metric]
        text = "–" if value is None else f"{value:.4g}"
        if metric == "numerical_rank" and value is not None:
            text = f"{value}/{metrics['n_eigenvalues']}"
        interval = drawn.interval(metric) if drawn is not None else None
        between = None if interval is None else (f"{interval.low:.3g}", f"{interval.high:.3g}")
        cells.append((label, text, "" if value is None else repr(value), between))
    return {
        "name": name,
        "n_params": f"{block.n_params:,}",
        "cells": cells,
        "whole": name == WHOLE,
        "union": name == UNION,
    }
