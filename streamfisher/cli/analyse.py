"""Commands that work on stored runs only: eigenvectors, compare, export. They read options, call, and print."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from streamfisher.cli.arguments import ANALYSIS, add_model_options, add_options
from streamfisher.cli.collect import load_what_it_was_made_with
from streamfisher.cli.options import read_run_options
from streamfisher.cli.output import AddCommand, print_json
from streamfisher.cli.selection import add_selection_options, check_target, selection_options
from streamfisher.errors import ConfigError
from streamfisher.runtime.printable import printable
from streamfisher.runtime.remote_filesystem import is_url

FORMATS = ("csv", "json", "npz", "parquet", "safetensors")


def add_commands(add: AddCommand) -> None:
    """Add the commands of this module."""
    eigenvectors = add("eigenvectors", _eigenvectors)
    eigenvectors.add_argument("run", metavar="RUN.zarr", help="the folder of a run")
    eigenvectors.add_argument("--block", required=True, help="key of the block, for example layer_3")
    eigenvectors.add_argument("--top", type=int, default=20, help="how many (default: %(default)s)")
    eigenvectors.add_argument("--out", default=None, metavar="FILE.safetensors", help="copy them into this file")
    eigenvectors.add_argument("--overwrite", action="store_true", help="replace those stored with other options")
    purpose = "where gradients were not kept: as the run was given it"
    add_model_options(eigenvectors, "a pass with the model", purpose)
    add_options(eigenvectors, *ANALYSIS)

    density = add("density", _density)
    density.add_argument("run", metavar="RUN.zarr", help="the folder of a run")
    density.add_argument("--block", required=True, help="key of the block, for example layer_3")
    density.add_argument("--vectors", type=int, default=10, help="random vectors (default: %(default)s)")
    density.add_argument("--steps", type=int, default=80, help="of Lanczos (default: %(default)s)")
    density.add_argument("--sigma", type=float, default=None, help="smoothing: decades, or eigenvalues (default: 0.1)")
    density.add_argument("--scale", default="log", metavar="log|linear", help="of the eigenvalues (default: log)")
    density.add_argument("--out", default=None, metavar="FILE.json", help="write grid, density and errors to this file")
    add_options(density, *ANALYSIS)

    compare = add("compare", _compare)
    compare.add_argument("runs", metavar="RUN.zarr", nargs="+", help="folders of runs, in order")
    compare.add_argument("--top", type=int, default=10, help="dimension of eigenspaces; 0: none (default: %(default)s)")
    compare.add_argument("--out", default=None, metavar="FILE", help="overlay the spectra in this .png, .svg or .pdf")
    compare.add_argument(
        "--html", default=None, metavar="FILE.html", help="a page: trajectories of every block, overlaps, spectra"
    )
    add_options(compare, *ANALYSIS)
    add_selection_options(compare)

    export = add("export", _export)
    export.add_argument("run", metavar="RUN.zarr", help="the folder of a run")
    export.add_argument("--to", required=True, metavar="|".join(FORMATS), help="the format")
    export.add_argument("--out", default=None, metavar="FILE", help="default: spectrum.SUFFIX in the working directory")
    add_options(export, *ANALYSIS)
    add_selection_options(export)


def _eigenvectors(arguments: argparse.Namespace) -> int:
    from streamfisher.store.staged import rewritten

    if arguments.out:
        check_target(Path(arguments.out), (".safetensors",))
    with rewritten(arguments.run) as folder:
        return _eigenvectors_of(folder, arguments)


def _eigenvectors_of(folder: Path, arguments: argparse.Namespace) -> int:
    """Write eigenvectors into the run in a folder, which is that of `arguments.run` or stands for its URL."""
    from streamfisher import open_run

    run = open_run(folder)
    options = read_run_options(arguments, base=run.config)
    model, data = None, None
    if arguments.model is not None:
        usage = "streamfisher eigenvectors RUN.zarr MODEL DATA --block BLOCK"
        model, data = load_what_it_was_made_with(run, arguments, usage)
    found = run.eigenvectors(
        arguments.block,
        arguments.top,
        options.centers[0],
        model=model,
        data=data,
        block_structure=options.structures[0],
        overwrite=arguments.overwrite,
        config=options.analysis_config(run.config),
        progress=not arguments.quiet,
    )
    if arguments.out:
        found.save_safetensors(arguments.out)
    place = str(found.path)
    if is_url(arguments.run):
        place = f"{arguments.run.rstrip('/')}/{found.path.relative_to(folder).as_posix()}"
    if arguments.json:
        print(json.dumps(found.to_dict() | {"path": place}))
        return 0
    values = ", ".join(f"{value:.4g}" for value in found.eigenvalues[:5])
    error = found.orthonormality_error
    print(f"{len(found)} eigenvectors of {printable(found.block)}, orthonormal to {error:.1e}: {printable(place)}")
    print(f"  eigenvalues {values}{', ...' if len(found) > 5 else ''}")
    if arguments.out:
        print(f"  copied to {arguments.out}")
    return 0


def _density(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run

    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    if arguments.out:
        check_target(Path(arguments.out), (".json",))
    found = run.spectral_density(
        arguments.block,
        options.centers[0],
        block_structure=options.structures[0],
        n_vectors=arguments.vectors,
        n_steps=arguments.steps,
        sigma=arguments.sigma,
        scale=arguments.scale,
        config=options.analysis_config(run.config),
        progress=not arguments.quiet,
    )
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if arguments.json:
        print_json(found.to_dict())
        return 0
    block = printable(found.block)
    print(f"{found.n_eigenvalues} eigenvalues of {block}, {found.n_vectors} vectors, {found.n_steps} steps:")
    errors = zip(found.counts, found.count_errors, found.count_quadrature_errors, strict=True)
    for low, high, (count, error, of_steps) in zip(found.edges, found.edges[1:], errors, strict=False):
        print(f"  {low:9.2e} to {high:9.2e}  {count:10.1f} +- {error:.1f} (vectors), {of_steps:.1f} (steps)")
    if found.scale == "log":
        print(f"  below                   {found.below:10.1f} +- {found.below_standard_error:.1f}")
    if arguments.out:
        print(f"  written to {arguments.out}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.analysis.compare import compare
    from streamfisher.reports.comparison import comparison_picture, comparison_table
    from streamfisher.reports.series_page import comparison_page
    from streamfisher.reports.verdict import verdict_text

    runs = [open_run(path) for path in arguments.runs]
    options = read_run_options(arguments, base=runs[0].config)
    if arguments.out:
        check_target(Path(arguments.out), (".png", ".svg", ".pdf"))
    if arguments.html:
        check_target(Path(arguments.html), (".html",))
    comparison = compare(
        runs,
        options.structures[0],
        options.centers[0],
        top=arguments.top,
        **selection_options(arguments, min(run.n_samples for run in runs)),
    )
    if arguments.json:
        print_json(comparison.to_dict())
    else:
        print(comparison_table(comparison))
    if arguments.out:
        comparison_picture(comparison, arguments.out)
        if not arguments.json:
            print(f"Picture: {arguments.out}")
    if arguments.html:
        report = comparison_page(comparison, arguments.html)
        if not arguments.json:
            print(f"Page: {report.path}\n{verdict_text(report.verdict)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.reports.export import export

    if arguments.to not in FORMATS:
        raise ConfigError(f"--to {arguments.to!r} is unknown; choose one of {', '.join(FORMATS)}.")
    target = Path(arguments.out or f"spectrum.{arguments.to}")
    check_target(target)
    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    chosen = selection_options(arguments, run.n_samples, run)
    config = options.analysis_config(run.config)
    spectra = [
        run.spectrum(structure, center, top_k=options.top_k, **chosen, config=config, progress=not arguments.quiet)
        for structure in options.structures
        for center in options.centers
    ]
    per_sample = {name: run.store.samples.per_sample(name) for name in ("loss", "n_targets", "valid")}
    files = export(spectra, target, arguments.to, per_sample=per_sample)
    if arguments.json:
        print_json({"files": [str(path) for path in files]})
    else:
        print("\n".join(f"Written: {path}" for path in files))
    return 0
