"""The command line: it reads options, calls what Python users call, and prints. Nothing is computed here."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamfisher import __version__
from streamfisher.config import format_bytes
from streamfisher.errors import StreamfisherError
from streamfisher.options import (
    RunOptions,
    add_analysis_options,
    add_collection_options,
    add_common_options,
    parse_samples,
    read_run_options,
)

_EPILOG = """exit codes: 0 done; 2 wrong input or settings; 3 a loss or gradient is not finite;
4 something stored is damaged; 5 no room on disk or in memory; 130 interrupted (resumable)"""


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
    try:
        return arguments.command(arguments)
    except StreamfisherError as error:
        if arguments.debug:
            raise
        print(f"streamfisher: error: {error}", file=sys.stderr)
        return error.exit_code
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
    collect = _command(commands, "collect", _collect, "per-sample gradients into a run; the same line again resumes")
    add_collection_options(collect)

    gram = _command(commands, "gram", _gram, "build the Gram matrices of a collected run")
    _add_run(gram)
    gram.add_argument("--rebuild", action="store_true", help="build all of them again from the stored rows")

    spectrum = _command(commands, "spectrum", _spectrum, "solve a stored run, without the model")
    _add_run(spectrum)
    add_analysis_options(spectrum)
    spectrum.add_argument("--samples", default=None, metavar="A:B", help="a slice of the samples, for example 0:512")
    spectrum.add_argument("--out", default=None, help="write the spectrum to this JSON file")

    report = _command(commands, "report", _report, "draw the eigenvalues of a stored run")
    _add_run(report)
    add_analysis_options(report)
    report.add_argument("--out", default=None, help=".png, .svg or .pdf (default: RUN.zarr/spectrum.png)")

    _add_run(_command(commands, "info", _info, "what a run holds and how far it is"))
    verify = _command(commands, "verify", _verify, "read everything and compare checksums")
    _add_run(verify)
    verify.add_argument(
        "--dry-run", action="store_true", help="only say what is damaged; otherwise the next `run` computes it again"
    )
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
    from streamfisher import SpectralConfig, collect
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
    run = _collected(options, arguments)
    return 0 if run is None else _analyse(run, options, arguments, write=True)


def _collect(arguments: argparse.Namespace) -> int:
    run = _collected(read_run_options(arguments), arguments)
    if run is not None:
        _print_info(run, arguments)
    return 0


def _collected(options: RunOptions, arguments: argparse.Namespace) -> Any:
    """Load model and data and collect; return the run on the main process and `None` on the others."""
    import torch
    from accelerate import PartialState

    from streamfisher import collect
    from streamfisher.data import load_samples
    from streamfisher.models import load_model

    config = options.config
    state = PartialState(cpu=config.device == "cpu" or not torch.cuda.is_available())
    device = state.device if config.device == "auto" else config.device
    source = load_samples(options.data, tokenize=options.tokenizer(), field=options.field, max_length=config.max_length)
    model = load_model(
        options.model, dtype=config.dtype_model, device=device, trust_remote_code=options.trust_remote_code
    )
    run = collect(
        model,
        source,
        options.out,
        config=config,
        n_samples=options.samples,
        description=options.description(),
        progress=not arguments.quiet,
    )
    main_process = state.is_main_process
    if state.num_processes > 1:
        state.destroy_process_group()
    return run if main_process else None


def _gram(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run

    run = open_run(arguments.run)
    built = run.build_grams(rebuild=arguments.rebuild, progress=not arguments.quiet)
    print(f"{len(built)} Gram matrices built, {len(run.parameters) - len(built)} were there already.")
    return 0


def _spectrum(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run

    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    samples = parse_samples(arguments.samples, run.n_samples)
    return _analyse(run, options, arguments, write=False, samples=samples, out=arguments.out)


def _report(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.report import picture

    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    path = picture(_spectra(run, options, arguments), arguments.out or run.path / "spectrum.png")
    print(f"The picture is in {path}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run

    _print_info(open_run(arguments.run), arguments)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.errors import CorruptRunError
    from streamfisher.verify import verify

    run = open_run(arguments.run)
    problems = verify(run, repair=not arguments.dry_run, progress=not arguments.quiet)
    if arguments.json:
        print(json.dumps([vars(problem) for problem in problems]))
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{run.path} is intact as far as it is finished.")
    return CorruptRunError.exit_code if problems else 0


def _spectra(run: Any, options: RunOptions, arguments: argparse.Namespace, samples: Any = None) -> list[Any]:
    return [
        run.spectrum(
            structure,
            center,
            samples,
            options.top_k,
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
    samples: Any = None,
    out: str | None = None,
) -> int:
    """Solve, print, and, for `write`, leave `spectrum.json` and a picture in the run."""
    import importlib.util

    from streamfisher.report import picture, table
    from streamfisher.spectrum import write_spectra

    spectra = _spectra(run, options, arguments, samples)
    if arguments.json:
        contents = [spectrum.to_dict() for spectrum in spectra]
        print(json.dumps(contents[0] if len(contents) == 1 else {"spectra": contents}))
    else:
        print("\n" + "\n\n".join(table(spectrum) for spectrum in spectra) + "\n")
    target = Path(out) if out else (run.path / "spectrum.json" if write else None)
    say = sys.stderr if arguments.json else sys.stdout
    if target is not None:
        print(f"Eigenvalues and metrics: {write_spectra(spectra, target)}", file=say)
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
    print(f"  data        {facts['data']['description']}")
    print(f"  loss        {facts['loss']}")
    for name, reason in facts["excluded"].items():
        print(f"  excluded    {name}: {reason}")
    for sample, reason in facts["skipped"].items():
        print(f"  skipped     sample {sample}: {reason}")
    from streamfisher.gradients import ProbeReport

    print(ProbeReport.from_dict(facts["probe"]).summary())
