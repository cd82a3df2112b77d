"""The commands and what each is for: all that `streamfisher --help` prints, and nothing that takes long to import."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from streamfisher.version import __version__

EPILOG = """exit codes: 0 done; 2 wrong input or settings; 3 a loss or gradient is not finite;
4 something stored is damaged; 5 no room on disk or in memory; 6 another rank failed, died or was given other work;
7 `verify` found a run intact and not finished;
130 SIGINT, 143 SIGTERM, 138 SIGUSR1: stopped, with what was in flight written; the same command goes on there"""

#: In the order of `--help`.
COMMANDS = {
    "demo": "everything on a small trained model that ships with the package",
    "run": "collect, reduce, solve and report; the same line again resumes",
    "replay": "make a run once more into another folder, with the options that it was made with",
    "collect": "per-sample gradients into a run; the same line again resumes",
    "gram": "build the Gram matrices of a collected run",
    "spectrum": "solve a stored run, without the model",
    "report": "a page about a stored run, or a picture of its eigenvalues",
    "plan": "bytes, passes, memory and time of a run before it runs; needs no weights and no data",
    "eigenvectors": "leading eigenvectors of a block, in parameter space",
    "density": "how many eigenvalues of a block lie where, by stochastic Lanczos quadrature",
    "compare": "two or more runs side by side",
    "export": "spectra and metrics in other programs' formats",
    "samples": "which samples carry a block's eigenvectors, have leverage, are alike, or move its metrics",
    "influence": "how the samples of a run act on queries: inner products, cosines, damped inverse-Fisher influence",
    "directions": "the share of the mean gradient, of an update and of queries in the leading eigenspaces",
    "info": "what a run holds and how far it is",
    "verify": "read everything and compare checksums",
}


class CommandParser(argparse.ArgumentParser):
    """Says in a line what is wrong with the words of a command, and what may have been meant."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what this command does not know: whoever called it knows other options."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the message with the nearest option or command, and exit."""
        words = message.split()
        typed = words[2] if message.startswith(("unrecognized arguments: ", "invalid choice: ")) else ""
        if "invalid choice: " in message:
            typed = message.split("invalid choice: ")[1].split(" ")[0].strip("'")
            message = message.split(" (choose from")[0]
        known = COMMANDS if self.prog == "streamfisher" else self._option_string_actions
        near = difflib.get_close_matches(typed.partition("=")[0], list(known), n=1) if typed else []
        hint = f" Did you mean {near[0]}?" if near else ""
        command = "streamfisher COMMAND" if self.prog == "streamfisher" else self.prog
        commands = f" COMMAND is one of {', '.join(COMMANDS)}." if command.endswith("COMMAND") and not near else ""
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')}.{hint}{commands} See `{command} --help`.\n")


def top_parser() -> tuple[argparse.ArgumentParser, Any]:
    """Return the parser of the words before a command, and where the parsers of the commands are added."""
    parser = CommandParser(
        prog="streamfisher",
        description="Exact spectra of the empirical Fisher of a model, streamed through disk in bounded memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"streamfisher {__version__}")
    return parser, parser.add_subparsers(title="commands", required=True, metavar="COMMAND")


def add_command(commands: Any, name: str) -> argparse.ArgumentParser:
    """Add the parser of one command, without its arguments."""
    text = COMMANDS[name]
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
