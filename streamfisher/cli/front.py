"""The `streamfisher` command: `--help` and `--version` answer at once, a command imports what it needs."""

from __future__ import annotations

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
    from streamfisher.cli.main import main as run

    return run(words)
