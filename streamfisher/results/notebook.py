"""How results show themselves in a notebook, and the pieces of HTML that the page shares."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, Protocol

from streamfisher.results.bootstrap import Bootstrap

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
    """One row of a table of metrics."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def n_params(self) -> int: ...  # noqa: D102
    @property
    def metrics(self) -> dict[str, Any]: ...  # noqa: D102


class Shown(Protocol):
    """What is shown of a spectrum."""

    @property
    def blocks(self) -> Mapping[str, Block]: ...  # noqa: D102
    @property
    def global_(self) -> Block: ...  # noqa: D102
    @property
    def metadata(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def bootstrap(self) -> Bootstrap | None: ...  # noqa: D102


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
        f"{_partial(spectrum)}{kind}, blocks: {structure_name(spectrum)}, "
        f"N = {facts.get('n_samples')} {facts.get('sample_unit', 'sample')}s, {facts.get('normalization')}"
    )


def structure_name(spectrum: Shown) -> str:
    """Return the name of the block structure; `own` for patterns of the user's own."""
    structure = spectrum.metadata.get("block_structure")
    return "own" if isinstance(structure, dict) else str(structure)


def _partial(spectrum: Shown) -> str:
    facts = spectrum.metadata
    if not facts.get("partial"):
        return ""
    return f"PARTIAL RUN ({facts.get('samples_collected')} of {facts.get('n_samples_stored')} samples): "


def metrics_table(spectrum: Shown) -> str:
    """Return the metrics of every block and of the whole as an HTML table, with intervals where there are any."""
    blocks = list(spectrum.blocks.values())
    blocks += [spectrum.global_] if len(blocks) > 1 else []
    head = "".join(f"<th>{name}</th>" for name in ("block", "parameters", *_COLUMNS.values()))
    body = "".join(_row(spectrum, block) for block in blocks)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def spectrum_html(spectrum: Shown) -> str:
    """Return what a notebook shows of a spectrum."""
    style = "<style>.sf td,.sf th{padding:.2rem .6rem;text-align:right}.sf td:first-child{text-align:left}</style>"
    error = spectrum.metadata.get("block_diagonal_error")
    note = f"<p>Block-diagonal error: {error:.3g}</p>" if error is not None and len(spectrum.blocks) > 1 else ""
    return f'{style}<div class="sf"><b>{escape(title(spectrum))}</b>{metrics_table(spectrum)}{note}</div>'


def run_html(run: ShownRun) -> str:
    """Return what a notebook shows of a run."""
    return f"<b>Run {escape(str(run.path))}</b>{_fact_table(_run_facts(run))}"


def _run_facts(run: ShownRun) -> dict[str, Any]:
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


def _fact_table(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _row(spectrum: Shown, block: Block) -> str:
    metrics = block.metrics
    drawn = None
    if spectrum.bootstrap is not None:
        drawn = spectrum.bootstrap.blocks.get(block.name, spectrum.bootstrap.global_)
    cells = [f"<td>{escape(block.name)}</td><td>{block.n_params:,}</td>"]
    for name in _COLUMNS:
        value = metrics[name]
        text = "&ndash;" if value is None else f"{value:.4g}"
        if name == "numerical_rank" and value is not None:
            text = f"{value}/{metrics['n_eigenvalues']}"
        interval = drawn.interval(name) if drawn is not None else None
        if interval is not None:
            text += f'<span class="interval">{interval.low:.3g}<br>to {interval.high:.3g}</span>'
        cells.append(f"<td>{text}</td>")
    whole = ' class="whole"' if block is spectrum.global_ else ""
    return f"<tr{whole}>{''.join(cells)}</tr>"
