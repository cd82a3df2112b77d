"""One self-contained HTML page about a run: a verdict in words, maps, curves, tables, and what they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.growth import grow, half
from streamfisher.analysis.run import StoredRun
from streamfisher.reports import figures
from streamfisher.reports.layer_maps import Cells, cells_and_alignment, layer_maps
from streamfisher.reports.page_parts import Report, Section, write_page
from streamfisher.reports.page_parts import figures_html as _figures
from streamfisher.reports.page_parts import rendered as _rendered
from streamfisher.reports.sample_map import sample_map
from streamfisher.reports.verdict import verdict
from streamfisher.results.analyses import Alignment, Growth
from streamfisher.results.notebook import fact_table, metrics_table, run_facts, structure_name
from streamfisher.results.notebook import title as spectrum_title
from streamfisher.results.panels import eigenvalue_unit
from streamfisher.results.spectrum import Spectrum

#: Alignment of more blocks than that is not drawn.
_MOST_ALIGNED = 64
#: Seconds that growth curves may take, and intervals, unless it is said otherwise.
BUDGET_SECONDS = 30.0


def html_report(
    run: StoredRun,
    spectra: Sequence[Spectrum],
    path: str | Path,
    *,
    seconds: float = BUDGET_SECONDS,
    progress: bool = False,
    **options: Any,
) -> Report:
    """Write the page, whole or not at all.

    Args:
        run: whose Grams the maps, the growth curves and the alignment are made from.
        spectra: of the run, each with its own curves and table; the verdict is of the first.
        path: of the page.
        seconds: that growth curves may take; the page says which sizes were left out for it.
        progress: show bars.
        options: of `Run.block_grams` (samples, weights, normalization, partial): for maps, growth and alignment.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    facts = spectra[0].metadata
    grams = run.block_grams("layer", bool(facts.get("centered")), progress=progress, **options)
    sums, cells, aligned = half(grams, grams.config.seed), None, None
    if 1 < len(grams.blocks) <= _MOST_ALIGNED:
        cells, aligned = cells_and_alignment(grams, sums)
    growth = grow(grams, seed=grams.config.seed, seconds=seconds, known=_of_layers(spectra, grams), sums=sums)
    findings = tuple(verdict(spectra[0], growth))
    whole = spectra[0].whole or spectra[0].global_
    return write_page(
        path,
        "page.html",
        findings,
        sections(run, spectra, _maps(grams, cells), aligned, growth, seconds, _samples(run, grams)),
        run=run.path.name,
        model=str(run.manifest.model["class"]).rsplit(".", 1)[-1],
        n_samples=f"{whole.n_samples:,}",
        n_params=f"{whole.n_params:,}",
        unit=facts.get("sample_unit", "sample"),
        partial=f"{facts['samples_collected']} of {facts['n_samples_stored']}" if facts.get("partial") else None,
    )


def sections(
    run: StoredRun,
    spectra: Sequence[Spectrum],
    maps: str,
    aligned: Alignment | None,
    growth: Growth,
    seconds: float,
    samples: str,
) -> list[Section]:
    """Return the parts of the page in their order."""
    found = [Section("Layers and modules", maps)]
    found += [Section(f"{_name(spectrum)}: curves", _curves(spectrum, n)) for n, spectrum in enumerate(spectra)]
    found += [Section("Was N enough?", _growth(growth, seconds)), Section("Spectral density", _density(spectra))]
    if aligned is not None:
        found.append(Section("Block alignment", _alignment(aligned)))
    found += [Section(f"{_name(spectrum)}: metrics", _table(spectrum)) for spectrum in spectra]
    found.append(Section("Samples", samples))
    return [*found, Section("Facts", _facts(run, spectra[0]))]


def _samples(run: StoredRun, grams: BlockGrams) -> str:
    return _rendered("samples.html", **sample_map(run, grams))


def _of_layers(spectra: Sequence[Spectrum], grams: BlockGrams) -> Spectrum | None:
    """Return the spectrum that was solved of these very Grams, all of it; `None` where there is none."""
    for spectrum in spectra:
        facts = spectrum.metadata
        same = facts.get("block_structure") == "layer" and bool(facts.get("centered")) == grams.center
        if same and list(spectrum.blocks) == list(grams.blocks) and not spectrum.global_.truncated:
            return spectrum
    return None


def _name(spectrum: Spectrum) -> str:
    kind = "Gradient covariance" if spectrum.metadata.get("centered") else "Empirical Fisher"
    name = structure_name(spectrum)
    of = "of the whole model" if name == "none" else "by own blocks" if name == "own" else f"by {name}"
    return f"{kind} {of}{' (partial run)' if spectrum.metadata.get('partial') else ''}"


def _maps(grams: BlockGrams, cells: Cells | None) -> str:
    maps, notes = layer_maps(grams, cells)
    return _rendered("heat.html", maps=maps, notes=notes)


def _curves(spectrum: Spectrum, number: int) -> str:
    caption = "Eigenvalues by rank. Faint: below the block's noise floor."
    if spectrum.bootstrap is not None:
        caption += " Bands: intervals, as far as every subset of the samples has so many eigenvalues."
    return _figures(
        (figures.eigenvalue_curves(spectrum, f"{_name(spectrum)}: eigenvalues {number}"), caption),
        (
            figures.cumulative_variance(spectrum, f"{_name(spectrum)}: cumulative variance {number}"),
            "Share of the trace in the leading eigenvalues.",
        ),
    )


def _growth(growth: Growth, seconds: float) -> str:
    texts = []
    if growth.left_out:
        sizes = ", ".join(f"{size:,}" for size in growth.left_out)
        texts.append(f"Left out, as they would have taken more than {seconds:g} s in all: {sizes} samples.")
    if len(growth.sizes) < 2:
        return _figures(texts=[*texts, "There are too few samples, or sizes, for a curve."])
    title = "Growth of the largest eigenvalue"
    rank = figures.growth_curves(growth, "effective_rank", "effective rank", "Growth of the effective rank")
    largest = figures.growth_curves(growth, "largest_eigenvalue", "largest eigenvalue", title, log=True)
    return _figures(
        (rank, "Effective rank of nested random subsets. What still rises at N is not converged."),
        (largest, "Largest eigenvalue of the same subsets."),
        texts=texts,
    )


def _density(spectra: Sequence[Spectrum]) -> str:
    named = [(structure_name(s) + (", centered" if s.metadata.get("centered") else ""), s.global_) for s in spectra]
    drawing = figures.densities(named, "Spectral density", eigenvalue_unit(spectra[0]))
    return _figures(
        (drawing, "Share of the eigenvalues above the noise floor per decade, of the union of each block structure.")
    )


def _alignment(aligned: Alignment) -> str:
    kind = "of centered gradients (linear CKA)" if aligned.centered else "of gradients"
    drawing = figures.heat_map(aligned.matrix, aligned.blocks, aligned.blocks, "Block alignment", label="alignment")
    return _figures((drawing, f"Normalised inner products of the blocks' Grams, {kind}: 0 where two never covary."))


def _table(spectrum: Spectrum) -> str:
    error = spectrum.metadata.get("block_diagonal_error")
    return _rendered(
        "tables.html",
        title=spectrum_title(spectrum),
        table=metrics_table(spectrum),
        intervals=None if spectrum.bootstrap is None else f"{spectrum.bootstrap.level:.0%}",
        heavy_tailed=None if spectrum.bootstrap is None else spectrum.bootstrap.heavy_tailed,
        error=f"{error:.3g}" if error is not None and len(spectrum.blocks) > 1 else None,
    )


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
        facts["intervals"] = (
            f"{drawn.level:.0%}, delete-d jackknife: {drawn.n_resamples} subsets without {drawn.n_left_out} samples, "
            f"seed {drawn.seed}"
        )
    versions = meta.get("analysed_with") or {}
    facts["analysed with"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return fact_table(facts)
