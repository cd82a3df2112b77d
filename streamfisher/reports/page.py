"""One self-contained HTML page about a run: spectra, what they say, and what they are of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.analysis.alignment import align
from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.growth import grow
from streamfisher.analysis.run import StoredRun
from streamfisher.blocks.structures import layer_key, module_key
from streamfisher.reports import figures
from streamfisher.results.notebook import _fact_table, _run_facts, metrics_table, structure_name
from streamfisher.results.notebook import title as spectrum_title
from streamfisher.results.spectrum import Spectrum

#: Alignment of more blocks than that is not drawn.
_MOST_ALIGNED = 64

_INTERVAL_NOTE = (
    "<p>Below each value: the percentile interval over bootstrap resamples of the samples. A resample has about 63 % "
    "of the distinct samples, so ranks come out lower in nearly all, and an interval may exclude its value.</p>"
)

#: The browser itself refuses whatever is not in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #bbb; }
p.lead { color: #444; margin-top: 0; } .partial { border: 2px solid #b00020; padding: .6rem 1rem; font-weight: 600; }
figure { margin: 1rem 0; display: inline-block; vertical-align: top; max-width: 100%; break-inside: avoid; }
figure svg { max-width: 100%; height: auto; } figcaption { font-size: .85rem; color: #444; max-width: 30rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .8rem; margin: .6rem 0; }
th, td { padding: .25rem .45rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; }
tr.whole td { font-weight: 600; } .interval { color: #555; font-size: .88em; display: block; font-weight: 400; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts td:first-child { color: #555; }
@page { margin: 1.2cm; }
@media print {
  body { margin: 0; max-width: none; padding: 0; font-size: 10px; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } table { font-size: 7px; } th, td { padding: .12rem .22rem; }
  tr { break-inside: avoid; }
  figure svg { width: 8.6cm; } figcaption { max-width: 8.6cm; font-size: 8px; } table.facts { font-size: 9px; }
}
"""


def html_report(run: StoredRun, spectra: Sequence[Spectrum], path: str | Path, **options: Any) -> Path:
    """Write the page.

    Args:
        run: the run.
        spectra: of the run, each with its own section.
        path: of the page.
        options: of `Run.block_grams` (samples, weights, normalization, partial): for heat maps and alignment.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    center = bool(spectra[0].metadata.get("centered"))
    grams = run.block_grams("layer", center, **options)
    parts = [_head(run, spectra[0])]
    parts += [_section(spectrum, number) for number, spectrum in enumerate(spectra)]
    parts += [_density(spectra), _growth(grams), _heat_maps(grams), _alignment(grams), _facts(run, spectra[0])]
    name = escape(run.path.name)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: Fisher spectrum</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _head(run: StoredRun, spectrum: Spectrum) -> str:
    facts = spectrum.metadata
    unit = facts.get("sample_unit", "sample")
    text = (
        f"<h1>Fisher spectrum of {escape(str(run.manifest.model['class']).rsplit('.', 1)[-1])}</h1>"
        f'<p class="lead">{spectrum.global_.n_samples:,} {escape(unit)}s, {spectrum.global_.n_params:,} parameters; '
        f"run <code>{escape(str(run.path.name))}</code></p>"
    )
    if facts.get("partial"):
        done = f"{facts['samples_collected']} of {facts['n_samples_stored']}"
        text += f'<p class="partial">Partial run: {done} samples are collected. All numbers below are of these.</p>'
    return text


def _section(spectrum: Spectrum, number: int) -> str:
    name = structure_name(spectrum)
    kind = "Gradient covariance" if spectrum.metadata.get("centered") else "Empirical Fisher"
    partial = " (partial run)" if spectrum.metadata.get("partial") else ""
    drawn = spectrum.bootstrap is not None
    bands = " Bands: bootstrap intervals, as far as every resample has so many eigenvalues." if drawn else ""
    error = spectrum.metadata.get("block_diagonal_error")
    note = ""
    if error is not None and len(spectrum.blocks) > 1:
        note = f"<p>Relative error of the block-diagonal approximation (Frobenius): {error:.3g}.</p>"
    curves = figures.eigenvalue_curves(spectrum, f"{kind} eigenvalues, blocks {name} {number}")
    shares = figures.cumulative_variance(spectrum, f"{kind} cumulative variance, blocks {name} {number}")
    return (
        f"<h2>{kind}, blocks: {escape(name)}{partial}</h2><p>{escape(spectrum_title(spectrum))}</p>"
        + metrics_table(spectrum)
        + (_INTERVAL_NOTE if drawn else "")
        + note
        + _figure(curves, f"Eigenvalues by rank. Faint: below the block's noise floor (dotted, if in range).{bands}")
        + _figure(shares, "Share of the trace in the leading eigenvalues.")
    )


def _density(spectra: Sequence[Spectrum]) -> str:
    named = [(structure_name(s) + (", centered" if s.metadata.get("centered") else ""), s.global_) for s in spectra]
    drawn = figures.densities(named, "Spectral density")
    return "<h2>Spectral density</h2>" + _figure(
        drawn, "Share of the eigenvalues above the noise floor per decade, of the union of each block structure."
    )


def _growth(grams: BlockGrams) -> str:
    """Effective rank and trace against the number of samples: whether N was enough."""
    found = grow(grams, seed=grams.config.seed)
    if len(found.sizes) < 2:
        return ""
    rank = figures.growth_curves(found, "effective_rank", "effective rank", "Growth of the effective rank")
    title = "Growth of the largest eigenvalue"
    top = figures.growth_curves(found, "largest_eigenvalue", "largest eigenvalue", title, log=True)
    return (
        "<h2>Was N enough?</h2>"
        + _figure(rank, "Effective rank of nested random subsets. What still rises at N is not converged.")
        + _figure(top, "Largest eigenvalue of the same subsets.")
    )


def _heat_maps(grams: BlockGrams) -> str:
    """Trace and effective rank of every (layer, module kind)."""
    stacks = {name: grams.assignment[name] for name in grams.parameters}  # layer keys, prefixed where needed
    cells = {name: f"{stacks[name]}/{_kind(name)}" for name in grams.parameters}
    spectrum = dataclasses.replace(grams, assignment=cells).spectrum()
    rows = list(dict.fromkeys(stacks.values()))
    columns = ["embedding", "normalization", "attention", "mlp", "output", "other"]
    columns = [kind for kind in columns if any(cell.endswith("/" + kind) for cell in cells.values())]
    maps = []
    for metric, label, log in (("trace", "trace", True), ("effective_rank", "effective rank", False)):
        matrix = np.full((len(rows), len(columns)), np.nan)
        for cell, block in spectrum.blocks.items():
            layer, kind = cell.rsplit("/", 1)
            matrix[rows.index(layer), columns.index(kind)] = block.metrics[metric]
        drawn = figures.heat_map(matrix, rows, columns, f"Layer by module: {label}", label=label, log=log)
        maps.append(_figure(drawn, f"{label.capitalize()} of each layer's modules."))
    return "<h2>Layers and modules</h2>" + "".join(maps)


def _kind(name: str) -> str:
    kind = module_key(name)
    return kind if layer_key(name) != "embedding" else "embedding"


def _alignment(grams: BlockGrams) -> str:
    if not 1 < len(grams.blocks) <= _MOST_ALIGNED:
        return ""
    found = align(grams)
    drawn = figures.heat_map(found.matrix, found.blocks, found.blocks, "Block alignment", label="alignment")
    kind = "of centered gradients (linear CKA)" if found.centered else "of gradients"
    return "<h2>Block alignment</h2>" + _figure(
        drawn, f"Normalised inner products of the blocks' Grams, {kind}: 0 where two blocks never covary."
    )


def _facts(run: StoredRun, spectrum: Spectrum) -> str:
    facts = _run_facts(run)
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
    return "<h2>Facts</h2>" + _fact_table(facts)


def _figure(drawn: str, caption: str) -> str:
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"
