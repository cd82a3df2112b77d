"""The `streamfisher` command: `--help` and `--version` answer at once, a command imports what it needs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from streamfisher.cli.commands import COMMANDS, add_command, top_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; arguments as `cli.main.main`."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] not in COMMANDS:
        parser, commands = top_parser()
        for name in COMMANDS:
            add_command(commands, name)
        parser.parse_args(words)  # prints, and exits
    if argv is None:  # a process of its own
        _end_at_interrupts()
    from streamfisher.cli.main import main as run

    return run(words)


def _end_at_interrupts() -> None:
    """Let SIGINT end this process without another word: while modules are imported there is nothing to finish.

    Raised inside an import, `KeyboardInterrupt` may be caught by whatever tries that import. While a command runs, it
    has handlers of its own.
    """
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
