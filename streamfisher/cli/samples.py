"""Commands about the samples of a stored run. They read options, call, and print."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.analysis.run import StoredRun
from streamfisher.cli.arguments import ANALYSIS, add_model_options, add_options
from streamfisher.cli.collect import load_what_it_was_made_with
from streamfisher.cli.options import RunOptions, read_run_options
from streamfisher.cli.output import AddCommand, print_json
from streamfisher.cli.selection import add_selection_options, check_target, chosen_samples, selection_options
from streamfisher.errors import ConfigError, DataError
from streamfisher.runtime.remote_filesystem import is_url

_SUFFIXES = (".csv", ".parquet", ".json")
_SCORES = ("influence", "inner", "cosine")


def add_sample_commands(add: AddCommand) -> None:
    """Add the commands of this module."""
    samples = add("samples", _samples)
    samples.add_argument("run", metavar="RUN.zarr", help="the folder of a run")
    samples.add_argument("--block", default="global", help="key of the block, for example layer_3 (default: all)")
    samples.add_argument("--top", type=int, default=20, help="leading eigenvectors (default: %(default)s)")
    samples.add_argument("--carriers", type=int, default=3, help="samples to name of each (default: %(default)s)")
    samples.add_argument(
        "--damping",
        default=None,
        metavar="A,B",
        help="of leverage (default: lambda_1 times 1, 0.1, ...)",
    )
    samples.add_argument(
        "--threshold", type=float, default=0.99, help="cosine from which gradients are alike (default: %(default)s)"
    )
    samples.add_argument("--out", default=None, metavar="FILE", help="all numbers to a .csv, .parquet or .json")
    _add_texts(samples)
    add_options(samples, *ANALYSIS)
    add_selection_options(samples, bootstrap=False)

    influence = add("influence", _influence)
    influence.add_argument("run", metavar="RUN.zarr", help="the folder of a run")
    influence.add_argument(
        "--queries",
        default=None,
        metavar="QUERIES.zarr|A:B|FILE",
        help="another run of the same model; or samples of this one, as for --samples, which then do not train "
        "(default: those that were added as queries)",
    )
    influence.add_argument("--damping", required=True, metavar="A,B", help="lambda, one or more, with commas")
    influence.add_argument("--relative", action="store_true", help="dampings are times each block's mean eigenvalue")
    influence.add_argument("--pseudo-inverse", action="store_true", help="let a damping of 0 leave out what is noise")
    influence.add_argument("--block", default=None, help="of this block only (default: the sum over all)")
    influence.add_argument("--score", default="influence", metavar="influence|inner|cosine", help="to rank by")
    influence.add_argument("--top", type=int, default=10, help="samples at each end (default: %(default)s)")
    influence.add_argument(
        "--out", default=None, metavar="FILE", help="both ends to a .csv, .parquet or .json; all scores to an .npz"
    )
    influence.add_argument(
        "--query-data", default=None, metavar="DATA", help="of QUERIES.zarr, where its gradients were not kept either"
    )
    _add_texts(influence)
    purpose = "where gradients were not kept: as RUN.zarr was given it"
    add_model_options(influence, "a pass with the model", purpose)
    add_options(influence, *ANALYSIS)
    add_selection_options(influence, bootstrap=False)

    directions = add("directions", _directions)
    directions.add_argument("run", metavar="RUN.zarr", help="the folder of a run")
    directions.add_argument("--block", default=None, help="this block only (default: each)")
    directions.add_argument("--top", type=int, default=10, help="leading eigenvectors (default: %(default)s)")
    directions.add_argument(
        "--update",
        default=None,
        metavar="FILE.safetensors",
        help="a difference of weights, one tensor a parameter",
    )
    directions.add_argument(
        "--queries", default=None, metavar="QUERIES.zarr|A:B|FILE", help="another run, or samples, as for `influence`"
    )
    directions.add_argument("--out", default=None, metavar="FILE", help="shares to a .csv, .parquet or .json")
    add_options(directions, *ANALYSIS)
    add_selection_options(directions, resamples=True)


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--texts", default=None, metavar="FILE", help="a line of text for each sample of the run, to show with it"
    )


def read_texts(path: str | None) -> list[str] | None:
    """Return the lines of a text file.

    Raises:
        DataError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"--texts {path} cannot be read: {error}") from error


def structure_option(arguments: argparse.Namespace, options: RunOptions) -> str | Mapping[str, str] | None:
    """Return the block structure that was asked for; `None` where it was not: whole models need none."""
    return None if arguments.structures is None else options.structures[0]


def read_dampings(text: str | None) -> list[float] | None:
    """Return the numbers of `--damping 1e-3,1e-2`.

    Raises:
        ConfigError: one is no number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--damping {text!r} must be numbers with commas, for example 1e-3,1e-2.") from None


def read_queries(text: str, run: StoredRun) -> str | Path | slice | np.ndarray | None:
    """Return the folder of another run, or samples of this one, that `--queries` names."""
    if is_url(text):
        return text
    if text.rstrip("/").endswith(".zarr") or Path(text).is_dir():
        return Path(text)
    return chosen_samples(text, run, "--queries", least=1)


def print_files(files: Sequence[Path]) -> None:
    """Say what was written."""
    print("\n".join(f"Written: {path}" for path in files))


def _samples(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.reports.samples import export_samples, samples_text

    if arguments.carriers < 1:
        raise ConfigError(f"--carriers {arguments.carriers}: name at least 1 sample.")
    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    if arguments.out:
        check_target(Path(arguments.out), _SUFFIXES)
    found = run.samples(
        arguments.block,
        arguments.top,
        options.centers[0],
        block_structure=structure_option(arguments, options),
        dampings=read_dampings(arguments.damping),
        threshold=arguments.threshold,
        texts=read_texts(arguments.texts),
        **selection_options(arguments, run.n_samples, run),
        config=options.analysis_config(run.config),
        progress=not arguments.quiet,
    )
    files = export_samples(found, arguments.out) if arguments.out else []
    if arguments.json:
        print_json(found.to_dict(arguments.carriers))
        return 0
    print(samples_text(found, arguments.carriers))
    if files:
        print_files(files)
    return 0


def _influence(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.reports.influence import export_influence, influence_text

    if arguments.top < 1:
        raise ConfigError(f"--top {arguments.top}: name at least 1 sample.")
    if arguments.score not in _SCORES:
        raise ConfigError(f"--score {arguments.score!r} is unknown; choose influence, inner or cosine.")
    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    if arguments.out:
        check_target(Path(arguments.out), (*_SUFFIXES, ".npz"))
    queries = None if arguments.queries is None else read_queries(arguments.queries, run)
    again: dict[str, Any] = {}
    if arguments.model is not None:
        if not isinstance(queries, Path):
            raise ConfigError("MODEL and DATA are for queries of another run; samples of this one need neither.")
        usage = "streamfisher influence RUN.zarr MODEL DATA --queries QUERIES.zarr --damping 1e-3"
        loaded = load_what_it_was_made_with(run, arguments, usage, open_run(queries))
        again = dict(zip(("model", "data", "query_data"), loaded, strict=True))
    found = run.influence(
        queries,
        read_dampings(arguments.damping) or [],
        arguments.block,
        options.centers[0],
        block_structure=structure_option(arguments, options),
        relative=arguments.relative,
        pseudo_inverse=arguments.pseudo_inverse,
        **again,
        texts=read_texts(arguments.texts),
        **selection_options(arguments, run.n_samples, run),
        config=options.analysis_config(run.config),
        progress=not arguments.quiet,
    )
    files = export_influence(found, arguments.out, arguments.top, arguments.score) if arguments.out else []
    if arguments.json:
        print_json(found.to_dict(arguments.top, arguments.score))
        return 0
    print(influence_text(found, arguments.top, arguments.score))
    if files:
        print_files(files)
    return 0


def _directions(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.reports.directions import directions_text, export_directions

    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    if arguments.out:
        check_target(Path(arguments.out), _SUFFIXES)
    found = run.directions(
        arguments.top,
        arguments.block,
        options.centers[0],
        block_structure=structure_option(arguments, options),
        update=arguments.update,
        queries=None if arguments.queries is None else read_queries(arguments.queries, run),
        **selection_options(arguments, run.n_samples, run),
        config=options.analysis_config(run.config),
        progress=not arguments.quiet,
    )
    files = export_directions(found, arguments.out) if arguments.out else []
    if arguments.json:
        print_json(found.to_dict())
        return 0
    print(directions_text(found))
    if files:
        print_files(files)
    return 0
