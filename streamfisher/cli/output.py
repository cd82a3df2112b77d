"""What commands print, and the spectra they print it of."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streamfisher.byte_sizes import format_bytes
from streamfisher.cli.options import RunOptions
from streamfisher.runtime.printable import printable

#: Makes the parser of one command: (name, function, description) -> parser.
AddCommand = Callable[[str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]


def print_json(content: Any) -> None:
    """Print plain JSON values on one line."""
    print(json.dumps(content, allow_nan=False))


def spectra_of(
    run: Any,
    options: RunOptions,
    arguments: argparse.Namespace,
    chosen: Mapping[str, Any] | None = None,
    *,
    keep: bool | None = None,
) -> list[Any]:
    """Return the spectra that the options ask for, of the chosen samples; `keep` as for `Run.spectrum`."""
    return [
        run.spectrum(
            structure,
            center,
            top_k=options.top_k,
            **(chosen or {}),
            config=options.analysis_config(run.config),
            progress=not arguments.quiet,
            keep=keep,
        )
        for structure in options.structures
        for center in options.centers
    ]


def analyse(
    run: Any,
    options: RunOptions,
    arguments: argparse.Namespace,
    *,
    write: bool,
    chosen: Mapping[str, Any] | None = None,
    out: str | None = None,
) -> int:
    """Solve, print, and, for `write`, leave `spectrum.json` and a picture in the run."""
    import importlib.util

    from streamfisher.reports.figures import picture
    from streamfisher.reports.named_spectra import write_named_spectra
    from streamfisher.reports.page import html_report
    from streamfisher.reports.text import table
    from streamfisher.reports.verdict import verdict_text
    from streamfisher.results.metrics import json_values
    from streamfisher.results.spectrum import write_spectra

    spectra = spectra_of(run, options, arguments, chosen, keep=True if write else None)
    if arguments.json:
        contents = [spectrum.to_dict() for spectrum in spectra]
        print_json(json_values(contents[0] if len(contents) == 1 else {"spectra": contents}))
    else:
        print("\n" + "\n\n".join(table(spectrum) for spectrum in spectra) + "\n")
    target = Path(out) if out else (run.path / "spectrum.json" if write else None)
    say = sys.stderr if arguments.json else sys.stdout
    if target is not None:
        print(f"Eigenvalues and metrics: {write_spectra(spectra, target)}", file=say)
        if write:
            run.store.markers.mark_result(target)
            write_named_spectra(run, spectra)
    if write and importlib.util.find_spec("matplotlib"):
        print(f"Picture: {picture(spectra, run.path / 'spectrum.png')}", file=say)
        report = html_report(run, spectra, run.path / "report.html", progress=not arguments.quiet)
        print(f"Report: {report.path}\n{verdict_text(report.verdict)}", file=say)
    elif write:
        print("No picture and no report: install it with pip install 'streamfisher[plots]'.", file=say)
    return 0


def print_info(run: Any, arguments: argparse.Namespace) -> None:
    """Print what a run holds and how far it is."""
    facts = run.info()
    if arguments.json:
        print(json.dumps(facts))
        return
    state = "complete" if facts["complete"] else "not finished"
    described = facts["data"]["description"]
    size = f"{facts['total_params']:,} parameters in {facts['n_parameters']} tensors"
    lines = [
        f"{facts['path']}: {state}, {facts['samples_done']} of {facts['n_samples']} {facts['data']['sample_unit']}s",
        f"  model       {facts['model']['class']}, {size}",
        f"  Grams       {facts['grams_done']} of {facts['n_grams']}",
        f"  on disk     {format_bytes(facts['bytes_on_disk'])}, rows in {facts['layout']['dtype_store']}",
        f"  data        {described.get('data') if isinstance(described, dict) else described or 'not described'}",
        *(f"  tokenizer   {text}" for text in _tokenizer(facts["data"])),
        *(f"  classes     {text}" for text in _classes(facts["data"])),
        f"  loss        {facts['loss']['loss']}: {facts['loss']['loss_reduction']}",
        *(f"  excluded    {name}: {reason}" for name, reason in facts["excluded"].items()),
        *(f"  skipped     sample {sample}: {reason}" for sample, reason in facts["skipped"].items()),
    ]
    print("\n".join(map(printable, lines)))
    from streamfisher.gradients import ProbeReport

    if not facts["probe"]:
        return
    print(ProbeReport.from_dict(facts["probe"]).summary())


def _tokenizer(data: Mapping[str, Any]) -> list[str]:
    """Return in words by what a run's text was encoded; nothing where it was no text, or an older run."""
    facts = data.get("tokenizer")
    if not isinstance(facts, dict):
        return []
    about = [str(facts[key]) for key in ("class",) if facts.get(key)]
    about += [f"{facts['n_tokens']:,} tokens"] if isinstance(facts.get("n_tokens"), int) else []
    return [f"{facts.get('name')} ({', '.join(about)})" if about else str(facts.get("name"))]


def _classes(data: Mapping[str, Any]) -> list[str]:
    """Return in words which classes of each input are samples; nothing where a sample is an input."""
    if "classes_per_input" not in data:
        return []
    k, of, left_out = data["classes_per_input"], data["n_classes"], data["left_out_probability"]
    rest = f", the others' probability is {left_out['mean']:.2g} (at most {left_out['largest']:.2g})" if k < of else ""
    return [f"{k:,} of {of:,} classes of each of {data['n_inputs']:,} inputs{rest}"]
