"""The command line: it reads options, calls what Python users call, and prints. Nothing is computed here."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamfisher import __version__
from streamfisher.cli.analyse import add_commands
from streamfisher.runtime.cluster import dask_client
from streamfisher.config import format_bytes
from streamfisher.errors import CapacityError, ConfigError, RunError, StreamfisherError, no_memory
from streamfisher.cli.options import (RunOptions, add_analysis_options, add_cluster_options, add_collection_options, add_common_options, add_deep_options, add_product_options, read_deep_options, read_run_options)
from streamfisher.cli.plan import add_plan_command, announce_plan
from streamfisher.runtime.run_log import RunLog
from streamfisher.cli.selection import add_selection_options, check_target, selection_options
from streamfisher.runtime.signals import die_with_launcher, stopping_at_once

_EPILOG = """exit codes: 0 done; 2 wrong input or settings; 3 a loss or gradient is not finite;
4 something stored is damaged; 5 no room on disk or in memory; 6 another rank failed, died or was given other work;
130 SIGINT, 143 SIGTERM, 138 SIGUSR1: stopped, with what was in flight written; the same command goes on there"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: arguments without the program's name; `None` means those of the process.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if getattr(arguments, "use_deterministic", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    warnings.filterwarnings("ignore", message=".*not recognized as a component of a Zarr hierarchy.*")
    die_with_launcher()
    try:
        with stopping_at_once():
            return arguments.command(arguments)
    except StreamfisherError as error:
        if arguments.debug:
            raise
        print(f"streamfisher: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has left, as in `streamfisher info RUN | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if arguments.debug:
            raise
        print(f"streamfisher: error: {error}. What is finished is kept; --debug shows where.", file=sys.stderr)
        return (
            CapacityError.exit_code
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
            else StreamfisherError.exit_code
        )
    except (MemoryError, RuntimeError) as error:
        if arguments.debug or not no_memory(error):
            raise
        print(
            f"streamfisher: error: no memory is left ({str(error).splitlines()[0] if str(error) else 'MemoryError'}). "
            "What is finished is kept. Take a smaller --chunk-size, --batch-tokens or --memory-budget, or one rank "
            "less on this host; --debug shows where.",
            file=sys.stderr,
        )
        return CapacityError.exit_code
    except KeyboardInterrupt:
        print("streamfisher: interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="streamfisher",
        description="Exact spectra of the empirical Fisher of a model, streamed through disk in bounded memory.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"streamfisher {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "everything on a small trained model that ships with the package")
    demo.add_argument("--out", default="streamfisher-demo.zarr", help="the run's folder (default: %(default)s)")
    demo.add_argument("--samples", type=int, default=256, help="sequences of 128 bytes (default: %(default)s)")

    run = _command(commands, "run", _run, "collect, reduce, solve and report; the same line again resumes")
    add_collection_options(run)
    add_analysis_options(run)
    add_cluster_options(run)
    collect = _command(commands, "collect", _collect, "per-sample gradients into a run; the same line again resumes")
    add_collection_options(collect)

    gram = _command(commands, "gram", _gram, "build the Gram matrices of a collected run")
    _add_run(gram)
    gram.add_argument("--rebuild", action="store_true", help="build all of them again from the stored rows")
    add_product_options(gram)
    add_cluster_options(gram)

    spectrum = _command(commands, "spectrum", _spectrum, "solve a stored run, without the model")
    _add_run(spectrum)
    add_analysis_options(spectrum)
    add_cluster_options(spectrum)
    add_selection_options(spectrum)
    spectrum.add_argument("--exact", action="store_true", help="refuse a run whose eigenvalues are estimates")
    spectrum.add_argument("--out", default=None, help="write the spectrum to this JSON file")

    report = _command(commands, "report", _report, "a page about a stored run, or a picture of its eigenvalues")
    _add_run(report)
    add_analysis_options(report)
    add_selection_options(report)
    report.add_argument(
        "--out", default=None, help=".html, .png, .svg or .pdf (default: report.html and spectrum.png in the run)"
    )

    add_plan_command(lambda name, function, text: _command(commands, name, function, text))
    add_commands(lambda name, function, text: _command(commands, name, function, text))
    info = _command(commands, "info", _info, "what a run holds and how far it is")
    _add_run(info)
    info.add_argument("--watch", action="store_true", help="follow a run that another process writes, until it ends")
    info.add_argument(
        "--interval", type=float, default=5.0, metavar="SECONDS", help="between two looks (default: %(default)s)"
    )
    verify = _command(commands, "verify", _verify, "read everything and compare checksums")
    _add_run(verify)
    verify.add_argument(
        "--dry-run", action="store_true", help="only say what is damaged; otherwise the next `run` computes it again"
    )
    add_deep_options(verify)
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    add_common_options(parser)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.zarr", help="the folder of a run")


def _demo(arguments: argparse.Namespace) -> int:
    from streamfisher import SpectralConfig
    from streamfisher.collection import collect
    from streamfisher.demo import demo_samples, load_demo_model

    config = SpectralConfig(use_deterministic=True)
    print(
        f"The demo model, {arguments.samples} sequences of 128 bytes of Python's standard library, to {arguments.out}"
    )
    run = collect(
        load_demo_model(),
        demo_samples(arguments.samples),
        arguments.out,
        config=config,
        description="sequences of 128 bytes of the standard-library sources of the running interpreter",
        progress=not arguments.quiet,
    )
    options = RunOptions(structures=("layer", "module", "none"), centers=(False, True))
    return _analyse(run, options, arguments, write=True)


def _run(arguments: argparse.Namespace) -> int:
    options = read_run_options(arguments)
    # From the start: an address that does not answer is found before days of gradients, and waves are reduced between.
    with dask_client(options.dask_scheduler if os.environ.get("RANK", "0") == "0" else None):
        run = _collected(options, arguments)
        if run is None:
            return 0
        with RunLog(run.path, "analysis"):
            return _analyse(run, options, arguments, write=True)


def _collect(arguments: argparse.Namespace) -> int:
    run = _collected(read_run_options(arguments), arguments)
    if run is not None:
        _print_info(run, arguments)
    return 0


def _collected(options: RunOptions, arguments: argparse.Namespace) -> Any:
    """Load model and data and collect; return the run on the main process and `None` on the others."""
    from streamfisher.collection import collect
    from streamfisher.data.loading import load_samples
    from streamfisher.models.loading import pick_device
    from streamfisher.collection.prepare import runs_in_waves
    from streamfisher.runtime.ranks import start_ranks
    from streamfisher.store.layout import check_free
    from streamfisher.models.skeleton import load_skeleton, skeleton_is_needed

    config = options.config
    new = not (Path(options.out) / "manifest.json").is_file()
    if new:
        check_free(Path(options.out))  # before a large model is loaded for nothing
    state = start_ranks(cpu=config.device == "cpu", timeout=config.rank_timeout)
    device = state.device if config.device == "auto" else pick_device(config.device)
    source = load_samples(options.data, tokenize=options.tokenizer(), field=options.field, max_length=config.max_length)
    if new and state.is_main_process and not arguments.quiet:
        announce_plan(options, source)
    weights = None
    loaded_whole = options.fsdp or options.device_map is not None or (not new and runs_in_waves(options.out, config))
    if not loaded_whole and skeleton_is_needed(options.model, config):
        model, weights = load_skeleton(
            options.model, dtype=config.dtype_model, device=device, trust_remote_code=options.trust_remote_code
        )
    else:
        model = _loaded(options, config, device)
    run = collect(
        model,
        source,
        options.out,
        config=config,
        n_samples=options.samples,
        description=options.description(),
        progress=not arguments.quiet,
        weights=weights,
    )
    main_process = state.is_main_process
    if state.num_processes > 1:
        state.destroy_process_group()
    return run if main_process else None


def _loaded(options: RunOptions, config: Any, device: Any) -> Any:
    """Load the whole model."""
    from streamfisher.models.loading import load_model
    from streamfisher.models.device_map import read_device_map

    return load_model(
        options.model,
        dtype=config.dtype_model,
        device=device,
        trust_remote_code=options.trust_remote_code,
        device_map=None if options.device_map is None else read_device_map(options.device_map),
        offload_folder=options.offload_folder or f"{options.out}.offload",
        sharded=options.fsdp,
    )


def _gram(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run

    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    with dask_client(options.dask_scheduler):
        config = options.analysis_config(run.config)
        if arguments.rebuild:
            return _print_rebuilt(run.rebuild_grams(config, progress=not arguments.quiet), arguments)
        built = run.build_grams(config, progress=not arguments.quiet)
    print(f"{len(built)} Gram matrices built, {len(run.parameters) - len(built)} were there already.")
    return 0


def _print_rebuilt(differences: dict[str, float | None], arguments: argparse.Namespace) -> int:
    """Say whether the Grams that were there agree with those made again."""
    if arguments.json:
        print(json.dumps(differences))
        return 0
    known = {name: value for name, value in differences.items() if value is not None}
    print(f"{len(differences)} Gram matrices built again from the stored rows.")
    if known:
        worst = max(known, key=known.__getitem__)
        print(
            f"{len(known)} were there before; they agree to {known[worst]:.1e} (relative, Frobenius; worst: {worst})."
        )
    if len(known) < len(differences):
        print(f"{len(differences) - len(known)} were missing or could not be read.")
    return 0


def _spectrum(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run

    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    chosen = {**selection_options(arguments, run.n_samples, run), "exact": arguments.exact}
    if arguments.out:
        check_target(Path(arguments.out))
    with dask_client(options.dask_scheduler):
        return _analyse(run, options, arguments, write=False, chosen=chosen, out=arguments.out)


def _report(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.reports.page import html_report
    from streamfisher.reports.text import picture

    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    targets = [Path(arguments.out)] if arguments.out else [run.path / "spectrum.png", run.path / "report.html"]
    for target in targets:
        check_target(target, (".html", ".png", ".svg", ".pdf"))
    chosen = selection_options(arguments, run.n_samples, run)
    if arguments.block_structure is None and targets[-1].suffix.lower() == ".html":
        options = dataclasses.replace(options, structures=("layer", "module", "none"))
    spectra = _spectra(run, options, arguments, chosen)
    for target in targets:
        if target.suffix.lower() == ".html":
            chosen.pop("bootstrap")
            print(f"The report is in {html_report(run, spectra, target, **chosen)}")
        else:
            print(f"The picture is in {picture(spectra, target)}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.cli.watch import follow

    if arguments.watch:
        if not arguments.interval > 0:
            raise ConfigError(f"--interval {arguments.interval}: give seconds, more than 0.")
        complete = follow(Path(arguments.run), lambda line: print(line, flush=True), interval=arguments.interval)
        return 0 if complete else RunError.exit_code
    _print_info(open_run(arguments.run), arguments)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.errors import CorruptRunError
    from streamfisher.verification.verify import Problem, verify, verify_manifest

    problems: list[Problem] = verify_manifest(Path(arguments.run), repair=not arguments.dry_run)
    if not (problems and arguments.dry_run):
        run = open_run(arguments.run)
        deep = _deep(run, arguments)
        problems += verify(run, repair=not arguments.dry_run, progress=not arguments.quiet, **deep)
    if arguments.json:
        print(json.dumps([vars(problem) for problem in problems]))
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{run.path} is intact as far as it is finished.")
            if deep:
                print(f"{deep['deep']} random samples are what the model gives.")
    return CorruptRunError.exit_code if problems else 0


def _deep(run: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load what `verify --deep` takes; nothing without it.

    Model and data are never taken from the manifest: a run from elsewhere must not choose what is loaded.
    """
    if arguments.deep is None:
        return {}
    from streamfisher.data.loading import load_samples
    from streamfisher.models.loading import pick_device
    from streamfisher.runtime.ranks import start_ranks

    options = read_deep_options(arguments, run.config)
    config = options.config
    device = (
        start_ranks(cpu=False, timeout=config.rank_timeout).device
        if config.device == "auto"
        else pick_device(config.device)
    )
    source = load_samples(options.data, tokenize=options.tokenizer(), field=options.field, max_length=config.max_length)
    model = _loaded(options, config, device)
    return {"deep": arguments.deep, "model": model, "samples": source, "seed": arguments.seed}


def _spectra(
    run: Any, options: RunOptions, arguments: argparse.Namespace, chosen: Mapping[str, Any] | None = None
) -> list[Any]:
    return [
        run.spectrum(
            structure,
            center,
            top_k=options.top_k,
            **(chosen or {}),
            config=options.analysis_config(run.config),
            progress=not arguments.quiet,
        )
        for structure in options.structures
        for center in options.centers
    ]


def _analyse(
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

    from streamfisher.reports.text import picture, table
    from streamfisher.results.spectrum import write_spectra

    spectra = _spectra(run, options, arguments, chosen)
    if arguments.json:
        contents = [spectrum.to_dict() for spectrum in spectra]
        print(json.dumps(contents[0] if len(contents) == 1 else {"spectra": contents}))
    else:
        print("\n" + "\n\n".join(table(spectrum) for spectrum in spectra) + "\n")
    target = Path(out) if out else (run.path / "spectrum.json" if write else None)
    say = sys.stderr if arguments.json else sys.stdout
    if target is not None:
        print(f"Eigenvalues and metrics: {write_spectra(spectra, target)}", file=say)
        if write:
            run.store.mark_result(target)
    if write and importlib.util.find_spec("matplotlib"):
        print(f"Picture: {picture(spectra, run.path / 'spectrum.png')}", file=say)
    elif write:
        print("No picture: install it with pip install 'streamfisher[plots]'.", file=say)
    return 0


def _print_info(run: Any, arguments: argparse.Namespace) -> None:
    facts = run.info()
    if arguments.json:
        print(json.dumps(facts))
        return
    state = "complete" if facts["complete"] else "not finished"
    print(f"{facts['path']}: {state}, {facts['samples_done']} of {facts['n_samples']} {facts['data']['sample_unit']}s")
    size = f"{facts['total_params']:,} parameters in {facts['n_parameters']} tensors"
    print(f"  model       {facts['model']['class']}, {size}")
    print(f"  Grams       {facts['grams_done']} of {facts['n_parameters']}")
    print(f"  on disk     {format_bytes(facts['bytes_on_disk'])}, rows in {facts['layout']['dtype_store']}")
    described = facts["data"]["description"]
    print(f"  data        {described['data'] if isinstance(described, dict) else described or 'not described'}")
    print(f"  loss        {facts['loss']['loss']}: {facts['loss']['loss_reduction']}")
    for name, reason in facts["excluded"].items():
        print(f"  excluded    {name}: {reason}")
    for sample, reason in facts["skipped"].items():
        print(f"  skipped     sample {sample}: {reason}")
    from streamfisher.gradients import ProbeReport

    print(ProbeReport.from_dict(facts["probe"]).summary())
