"""`streamfisher verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from streamfisher.cli.collect import load_what_it_was_made_with
from streamfisher.cli.options import check_deep
from streamfisher.runtime.paths import expanded
from streamfisher.runtime.printable import printable

#: Exit code for a run that is intact and not finished.
UNFINISHED = 7


def verify_command(arguments: argparse.Namespace) -> int:
    """Check a run against its checksums, and with `--deep` against its model; change it only with `--repair`."""
    from streamfisher.store.staged import rewritten

    if arguments.repair:
        with rewritten(arguments.run) as folder:
            return _verify(folder, arguments)
    return _verify(expanded(arguments.run), arguments)


def _verify(path: Path, arguments: argparse.Namespace) -> int:
    """Check the run at a path, which is that of `arguments.run` or stands for its URL."""
    from streamfisher import open_run
    from streamfisher.errors import CorruptRunError
    from streamfisher.verification.problem import Problem
    from streamfisher.verification.verify import unfinished, verify, verify_manifest

    run, state = None, None
    deep: dict[str, Any] = {}
    problems: list[Problem] = verify_manifest(path, repair=arguments.repair)
    if not problems or arguments.repair:
        run = open_run(path)
        state = unfinished(run)
        deep = _deep(run, arguments)
        problems += verify(run, repair=arguments.repair, progress=not arguments.quiet, **deep)
    if arguments.json:
        print(json.dumps([vars(problem) for problem in problems]))
    else:
        for problem in problems:
            print(printable(problem))
        if problems:
            print(_what_now(run, arguments))
        elif state is None:
            print(f"{arguments.run} is intact.")
        else:
            print(
                f"{arguments.run} is intact as far as it is finished: {state}. The command that made it goes on there."
            )
        if deep and not problems:
            print(f"{deep['deep']} random samples are what the model gives.")
    return CorruptRunError.exit_code if problems else UNFINISHED if state else 0


def _what_now(run: Any, arguments: argparse.Namespace) -> str:
    """Say what `verify` did about what it found, and what is left to do."""
    from streamfisher.verification.verify import only_by_a_new_pass, unfinished

    if not arguments.repair:
        return (
            f"Nothing was changed. `streamfisher verify {arguments.run} --repair` removes the markers of what is "
            "damaged; the command that made the run then computes it again, with its model and data."
        )
    state, lost = unfinished(run), only_by_a_new_pass(run)
    text = f"Repaired{f': {state}' if state else ''}. The command that made the run computes again what is missing."
    if lost:
        names = printable(", ".join(lost[:3])) + (", ..." if len(lost) > 3 else "")
        text += (
            f" The gradients of {len(lost)} Grams were deleted after they were reduced ({names}): only a new "
            "pass of their waves over all samples, with the model and the data, brings these back."
        )
    return text


def _deep(run: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load what `verify --deep` takes; nothing without it."""
    if arguments.deep is None:
        return {}
    check_deep(arguments.deep)
    usage = f"streamfisher verify RUN.zarr MODEL DATA --deep {arguments.deep}"
    model, source = load_what_it_was_made_with(run, arguments, usage)
    return {"deep": arguments.deep, "model": model, "samples": source, "seed": arguments.seed}
