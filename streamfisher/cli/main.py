"""The command line: it reads options, calls what Python users call, and prints. Nothing is computed here."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from streamfisher.cli.analyse import add_commands
from streamfisher.cli.arguments import (
    ANALYSIS,
    ELSEWHERE,
    add_collection_options,
    add_common_options,
    add_deep_options,
    add_options,
)
from streamfisher.cli.collect import collect_command, demo_command, replay_command, run_command
from streamfisher.cli.commands import add_command, top_parser
from streamfisher.cli.options import read_run_options
from streamfisher.cli.output import analyse, print_info, spectra_of
from streamfisher.cli.plan import add_plan_command
from streamfisher.cli.samples import add_sample_commands
from streamfisher.cli.selection import add_selection_options, check_target, selection_options
from streamfisher.cli.verify import verify_command
from streamfisher.errors import CapacityError, ConfigError, RunError, StreamfisherError, first_line, no_memory
from streamfisher.runtime.dask_pool import dask_client
from streamfisher.runtime.paths import expanded
from streamfisher.runtime.printable import printable, printable_message
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.runtime.signals import die_with_launcher, stopping_at_once

#: Of more samples a report solves layers and the whole only, unless more is asked for.
_MANY_SAMPLES = 2048


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: arguments without the program's name; `None` means those of the process.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        if isinstance(value, str) and value.startswith("~"):  # the shell leaves `--out=~/runs/x` as it is
            setattr(arguments, name, str(expanded(value)))
    if getattr(arguments, "use_deterministic", False):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    if arguments.quiet:
        _no_bars_of_others()
    warnings.filterwarnings("ignore", message=".*not recognized as a component of a Zarr hierarchy.*")
    die_with_launcher()
    try:
        with stopping_at_once(), _printable_warnings():
            return arguments.command(arguments)
    except StreamfisherError as error:
        if arguments.debug:
            raise
        print(f"streamfisher: error: {printable_message(error)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has left, as in `streamfisher info RUN | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, MemoryError, RuntimeError, ImportError, SystemError) as error:
        if arguments.debug or not (isinstance(error, OSError) or no_memory(error)):
            raise
        if no_memory(error):
            print(
                f"streamfisher: error: no memory is left ({first_line(error)}). "
                "What is finished is kept. Take a smaller --chunk-size, --batch-tokens or --memory-budget, or one rank "
                "less on this host; --debug shows where.",
                file=sys.stderr,
            )
            return CapacityError.exit_code
        print(
            f"streamfisher: error: {printable(error)}. What is finished is kept; --debug shows where.", file=sys.stderr
        )
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
        return CapacityError.exit_code if full else StreamfisherError.exit_code
    except KeyboardInterrupt:
        print("streamfisher: interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130


def _no_bars_of_others() -> None:
    """Switch off the bars that transformers and the Hub draw while they load."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when they are imported
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


@contextlib.contextmanager
def _printable_warnings() -> Iterator[None]:
    """Print warnings, which may quote what a run says, so that nothing in them acts on the terminal."""
    plain = warnings.formatwarning

    def shown(message: Warning | str, *more: Any) -> str:
        return plain(printable_message(message), *more)

    warnings.formatwarning = shown  # type: ignore[assignment]  # takes whatever more there is
    try:
        yield
    finally:
        warnings.formatwarning = plain


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser, commands = top_parser()

    demo = _command(commands, "demo", demo_command)
    demo.add_argument("--out", default="streamfisher-demo.zarr", help="the run's folder (default: %(default)s)")
    demo.add_argument("--samples", type=int, default=256, help="sequences of 128 bytes (default: %(default)s)")

    run = _command(commands, "run", run_command)
    add_collection_options(run, verbose=True)
    add_options(run, *ANALYSIS, *ELSEWHERE)
    replay = _command(commands, "replay", replay_command)
    _add_run(replay)
    replay.add_argument("--out", required=True, metavar="NEW.zarr", help="the new run's folder")
    replay.add_argument("--trust-remote-code", action="store_true", help="where the run was made with it")
    replay.add_argument("--verbose", action="store_true", help="the plan with its stages and alternatives")
    collect = _command(commands, "collect", collect_command)
    add_collection_options(collect, verbose=True)

    gram = _command(commands, "gram", _gram)
    _add_run(gram)
    gram.add_argument("--rebuild", action="store_true", help="build all of them again from the stored rows")
    add_options(gram, "reduction", *ELSEWHERE)

    spectrum = _command(commands, "spectrum", _spectrum)
    _add_run(spectrum)
    add_options(spectrum, *ANALYSIS, *ELSEWHERE)
    add_selection_options(spectrum)
    spectrum.add_argument("--exact", action="store_true", help="refuse a run whose eigenvalues are estimates")
    spectrum.add_argument("--out", default=None, help="write the spectrum to this JSON file")

    report = _command(commands, "report", _report)
    _add_run(report)
    add_options(report, *ANALYSIS)
    add_selection_options(report)
    report.add_argument(
        "--out",
        default=None,
        help=".html, .png, .svg or .pdf (default: report.html and spectrum.png in the run, here where it is a URL)",
    )

    report.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help="that intervals may take, and growth curves; what is left out for it is said (default: %(default)g)",
    )

    add_plan_command(lambda name, function: _command(commands, name, function))
    add_commands(lambda name, function: _command(commands, name, function))
    add_sample_commands(lambda name, function: _command(commands, name, function))
    info = _command(commands, "info", _info)
    _add_run(info)
    info.add_argument("--watch", action="store_true", help="follow a run that another process writes, until it ends")
    info.add_argument(
        "--interval", type=float, default=5.0, metavar="SECONDS", help="between two looks (default: %(default)s)"
    )
    verify = _command(commands, "verify", verify_command)
    _add_run(verify)
    repair = verify.add_mutually_exclusive_group()
    repair.add_argument(
        "--repair",
        action="store_true",
        help="remove the markers of what is damaged, so that the next `run` computes it again, with model and data",
    )
    repair.add_argument("--dry-run", action="store_true", help="only say what is damaged: what happens anyway")
    add_deep_options(verify)
    return parser


def _command(commands: Any, name: str, function: Any) -> argparse.ArgumentParser:
    parser = add_command(commands, name)
    parser.set_defaults(command=function)
    add_common_options(parser)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN.zarr", help="the folder of a run")


def _gram(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.store.staged import rewritten

    with rewritten(arguments.run) as folder:
        run = open_run(folder)
        options = read_run_options(arguments, base=run.config)
        with dask_client(options.dask_scheduler):
            config = options.analysis_config(run.config)
            if arguments.rebuild:
                return _print_rebuilt(run.rebuild_grams(config, progress=not arguments.quiet), arguments)
            built = run.build_grams(config, progress=not arguments.quiet)
    print(f"{len(built)} Gram matrices built, {len(run.store.gram_members) - len(built)} were there already.")
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
        how = f"they agree to {known[worst]:.1e} (relative, Frobenius; worst: {printable(worst)})"
        print(f"{len(known)} were there before; {how if known[worst] else 'they are bit-identical'}.")
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
        return analyse(run, options, arguments, write=False, chosen=chosen, out=arguments.out)


def _report(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.reports.figures import picture
    from streamfisher.reports.named_spectra import write_named_spectra
    from streamfisher.reports.page import html_report
    from streamfisher.reports.verdict import verdict_text

    run = open_run(arguments.run)
    options = read_run_options(arguments, base=run.config)
    folder = Path() if isinstance(run.path, RemotePath) else run.path
    targets = [Path(arguments.out)] if arguments.out else [folder / "spectrum.png", folder / "report.html"]
    for target in targets:
        check_target(target, (".html", ".png", ".svg", ".pdf"))
    chosen = selection_options(arguments, run.n_samples, run)
    if arguments.structures is None and targets[-1].suffix.lower() == ".html":
        small = run.n_samples <= _MANY_SAMPLES
        options = dataclasses.replace(options, structures=("layer", "module", "none") if small else ("layer",))
        if not small:
            print("Many samples: layers and the whole model. --blocks layer,module,none shows more, slowly.")
    if arguments.bootstrap:
        share = arguments.seconds / (len(options.structures) * len(options.centers))
        chosen["bootstrap_seconds"] = share
    spectra = spectra_of(run, options, arguments, chosen, keep=None if arguments.out else True)
    if not arguments.out:
        write_named_spectra(run, spectra)
    if arguments.bootstrap and not all(spectrum.bootstrap for spectrum in spectra):
        print(f"No intervals: 8 subsets of the samples take more than their share of --seconds {arguments.seconds:g}.")
    for target in targets:
        if target.suffix.lower() == ".html":
            chosen = {name: value for name, value in chosen.items() if not name.startswith("bootstrap")}
            progress = not arguments.quiet
            report = html_report(run, spectra, target, seconds=arguments.seconds, progress=progress, **chosen)
            print(f"{verdict_text(report.verdict)}\nThe report is in {report.path}")
        else:
            print(f"The picture is in {picture(spectra, target)}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from streamfisher import open_run
    from streamfisher.cli.watch import follow

    if arguments.watch:
        if not arguments.interval > 0:
            raise ConfigError(f"--interval {arguments.interval}: give seconds, more than 0.")
        complete = follow(expanded(arguments.run), lambda line: print(line, flush=True), interval=arguments.interval)
        return 0 if complete else RunError.exit_code
    print_info(open_run(arguments.run), arguments)
    return 0
