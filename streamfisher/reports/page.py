"""One self-contained HTML page about a run: spectra, what they say, and what they are of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.analysis.alignment import align
from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.growth import grow
from streamfisher.analysis.run import StoredRun
from streamfisher.blocks.structures import layer_key, module_key
from streamfisher.reports import figures
from streamfisher.results.notebook import fact_table, metrics_table, run_facts, structure_name, templates
from streamfisher.results.notebook import title as spectrum_title
from streamfisher.results.panels import eigenvalue_unit
from streamfisher.results.spectrum import Spectrum
from streamfisher.runtime.durable import replacing

#: Alignment of more blocks than that is not drawn.
_MOST_ALIGNED = 64


def html_report(run: StoredRun, spectra: Sequence[Spectrum], path: str | Path, **options: Any) -> Path:
    """Write the page, whole or not at all, and return its path.

    Args:
        run: whose Grams the heat maps and the alignment are made from.
        spectra: of the run, each with its own section.
        path: of the page.
        options: of `Run.block_grams` (samples, weights, normalization, partial): for heat maps and alignment.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    center = bool(spectra[0].metadata.get("centered"))
    grams = run.block_grams("layer", center, **options)
    whole, facts = spectra[0].global_, spectra[0].metadata
    page = (
        templates("streamfisher.reports")
        .get_template("page.html")
        .render(
            run=run.path.name,
            model=str(run.manifest.model["class"]).rsplit(".", 1)[-1],
            n_samples=f"{whole.n_samples:,}",
            n_params=f"{whole.n_params:,}",
            unit=facts.get("sample_unit", "sample"),
            partial=f"{facts['samples_collected']} of {facts['n_samples_stored']}" if facts.get("partial") else None,
            sections=[_section(spectrum, number) for number, spectrum in enumerate(spectra)],
            density=_density(spectra),
            growth=_growth(grams),
            maps=_heat_maps(grams),
            alignment=_alignment(grams),
            facts=_facts(run, spectra[0]),
        )
    )
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8
    return path


def _section(spectrum: Spectrum, number: int) -> dict[str, Any]:
    """What the page says of one spectrum."""
    name = structure_name(spectrum)
    kind = "Gradient covariance" if spectrum.metadata.get("centered") else "Empirical Fisher"
    error = spectrum.metadata.get("block_diagonal_error")
    return {
        "name": name,
        "kind": kind,
        "partial": bool(spectrum.metadata.get("partial")),
        "title": spectrum_title(spectrum),
        "table": metrics_table(spectrum),
        "intervals": spectrum.bootstrap is not None,
        "error": f"{error:.3g}" if error is not None and len(spectrum.blocks) > 1 else None,
        "curves": figures.eigenvalue_curves(spectrum, f"{kind} eigenvalues, blocks {name} {number}"),
        "shares": figures.cumulative_variance(spectrum, f"{kind} cumulative variance, blocks {name} {number}"),
    }


def _density(spectra: Sequence[Spectrum]) -> str:
    named = [(structure_name(s) + (", centered" if s.metadata.get("centered") else ""), s.global_) for s in spectra]
    return figures.densities(named, "Spectral density", eigenvalue_unit(spectra[0]))


def _growth(grams: BlockGrams) -> dict[str, str] | None:
    """Effective rank and largest eigenvalue against the number of samples: whether N was enough."""
    growth = grow(grams, seed=grams.config.seed)
    if len(growth.sizes) < 2:
        return None
    title = "Growth of the largest eigenvalue"
    return {
        "rank": figures.growth_curves(growth, "effective_rank", "effective rank", "Growth of the effective rank"),
        "largest": figures.growth_curves(growth, "largest_eigenvalue", "largest eigenvalue", title, log=True),
    }


def _heat_maps(grams: BlockGrams) -> dict[str, str]:
    """Trace and effective rank of every (layer, module kind)."""
    stacks = {name: grams.assignment[name] for name in grams.parameters}  # layer keys, prefixed where needed
    cells = {name: f"{stacks[name]}/{_kind(name)}" for name in grams.parameters}
    spectrum = dataclasses.replace(grams, assignment=cells).spectrum()
    rows = list(dict.fromkeys(stacks.values()))
    columns = ["embedding", "normalization", "attention", "mlp", "output", "other"]
    columns = [kind for kind in columns if any(cell.endswith("/" + kind) for cell in cells.values())]
    maps = {}
    for metric, label, log in (("trace", "trace", True), ("effective_rank", "effective rank", False)):
        matrix = np.full((len(rows), len(columns)), np.nan)
        for cell, block in spectrum.blocks.items():
            layer, kind = cell.rsplit("/", 1)
            matrix[rows.index(layer), columns.index(kind)] = block.metrics[metric]
        maps[label] = figures.heat_map(matrix, rows, columns, f"Layer by module: {label}", label=label, log=log)
    return maps


def _kind(name: str) -> str:
    kind = module_key(name)
    return kind if layer_key(name) != "embedding" else "embedding"


def _alignment(grams: BlockGrams) -> dict[str, str] | None:
    if not 1 < len(grams.blocks) <= _MOST_ALIGNED:
        return None
    aligned = align(grams)
    return {
        "drawing": figures.heat_map(
            aligned.matrix, aligned.blocks, aligned.blocks, "Block alignment", label="alignment"
        ),
        "kind": "of centered gradients (linear CKA)" if aligned.centered else "of gradients",
    }


def _facts(run: StoredRun, spectrum: Spectrum) -> str:
    facts = run_facts(run)
    meta = spectrum.metadata
    facts["products, eigensolve"] = f"{meta.get('dtype_gram')}, {meta.get('dtype_eigensolve')}"
    if meta.get("projection"):
        facts["projection"] = f"rows are random projections to at most {meta['projection']['numbers']} numbers"
    if meta.get("parameter_subsampling"):
        facts["parameter subsampling"] = f"{meta['parameter_subsampling']} columns per block, rescaled"
    if meta.get("samples"):
        facts["samples"] = meta["samples"]
    if meta.get("weights"):
        facts["weights"] = ", ".join(f"{name}: {value:.4g}" for name, value in meta["weights"].items())
    if spectrum.bootstrap is not None:
        drawn = spectrum.bootstrap
        facts["intervals"] = f"{drawn.level:.0%} percentile, {drawn.n_resamples} resamples, seed {drawn.seed}"
    versions = meta.get("analysed_with") or {}
    facts["analysed with"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return fact_table(facts)
