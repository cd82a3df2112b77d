"""One command for each campaign; from the repository's root:

    PYTHONPATH=tests python -m campaign faults --cases 240 --seed 1
    PYTHONPATH=tests python -m campaign corruption --cases 320 --seed 1
    PYTHONPATH=tests python -m campaign hostile --cases 320 --seed 1

Exits with 1 if one case was not survived. As root on Linux, faults of the disk are real: a small filesystem is mounted
that fills up, becomes read-only or vanishes. Otherwise they are errors of single operations.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from campaign.workers import import_everything


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign, print its table and every case that was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("faults", "corruption", "hostile"))
    parser.add_argument("--cases", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only",
        default=None,
        metavar="KIND",
        help="faults of one kind; hostile cases of kinds, or by their numbers, with commas",
    )
    parser.add_argument("--no-mounts", action="store_true", help="inject faults of the disk as errors")
    parser.add_argument("--json", default=None, metavar="FILE", help="write all cases to this file")
    arguments = parser.parse_args(argv)
    import_everything()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        cases = {"faults": _faults, "corruption": _corruption, "hostile": _hostile}[arguments.what](
            Path(name), arguments
        )
    wrong = [case for case in cases if case.wrong]
    for case in wrong:
        print(f"NOT SURVIVED: {case}\n", file=sys.stderr)
    seconds = time.monotonic() - start
    print(f"{len(cases)} cases, {len(cases) - len(wrong)} survived, seed {arguments.seed}, {seconds:.0f} s")
    return 1 if wrong else 0


def _faults(folder: Path, arguments: argparse.Namespace) -> list:
    from campaign.fault_campaign import Campaign, table
    from campaign.faults import Disk

    disk = None
    if not arguments.no_mounts and os.geteuid() == 0:
        disk = Disk(folder / "home", folder / "seen")
        try:
            disk.mount()
        except OSError as error:
            print(f"Nothing can be mounted here ({error}): faults of the disk are injected as errors.", file=sys.stderr)
            disk = None
    try:
        campaign = Campaign(folder, disk)
        cases = campaign.draw(arguments.cases, arguments.seed)
        cases = [case for case in cases if arguments.only in (None, case.kind)]
        for number, case in enumerate(cases):
            campaign.run(case)
            _save(cases[: number + 1], arguments)
            print(f"{number + 1}/{len(cases)} {case.kind}, {case.stage}: {case.ended}", file=sys.stderr, flush=True)
    finally:
        if disk is not None:
            disk.unmount()
    print(f"Disk faults: {'a mounted filesystem' if disk else 'injected errors'}")
    print(table(cases))
    return cases


def _save(cases: Sequence[Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(case) for case in cases], indent=1))


def _corruption(folder: Path, arguments: argparse.Namespace) -> list:
    from campaign.corruption_campaign import DAMAGED, Campaign, table

    campaign = Campaign(folder, DAMAGED)
    cases = campaign.draw(arguments.cases, arguments.seed)
    for number, case in enumerate(cases):
        campaign.run(case, arguments.seed + number)
        _save(cases[: number + 1], arguments)
        found = "named" if case.named else "not named"
        print(
            f"{number + 1}/{len(cases)} {case.operation} {case.path} {case.other}: {found}", file=sys.stderr, flush=True
        )
    print(table(cases))
    return cases


def _hostile(folder: Path, arguments: argparse.Namespace) -> list:
    import transformers.models.llama.modeling_llama  # noqa: F401
    from campaign.hostile_campaign import Campaign, table

    campaign = Campaign(folder)
    cases = campaign.draw(arguments.cases, arguments.seed, arguments.only)
    for done, case in enumerate(cases, start=1):
        campaign.run(case)
        _save(cases[:done], arguments)
        how = "NOT SURVIVED" if case.wrong else f"{case.refused} of {case.commands} commands refused it"
        print(f"{done}/{len(cases)} {case.number} {case.kind}: {case.what}: {how}"[:400], file=sys.stderr, flush=True)
    print(table(cases))
    return cases


if __name__ == "__main__":
    sys.exit(main())
