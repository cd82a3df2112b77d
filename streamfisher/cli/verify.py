"""`streamfisher verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from streamfisher.cli.collect import _loaded
from streamfisher.cli.options import read_deep_options


def verify_command(arguments: argparse.Namespace) -> int:
    """Check a run against its checksums, and with `--deep` against its model."""
    from streamfisher import open_run
    from streamfisher.errors import CorruptRunError
    from streamfisher.verification.problem import Problem
    from streamfisher.verification.verify import verify, verify_manifest

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
