"""Arguments of commands, made from the definitions of the options."""

from __future__ import annotations

import argparse
from typing import Any

from streamfisher.cli.options import OPTIONS
from streamfisher.config.option import Group

#: Whatever decides the gradients of a run.
COLLECTION: tuple[Group, ...] = ("data", "model and devices", "gradients", "store")
#: Whatever decides the spectra of given gradients.
ANALYSIS: tuple[Group, ...] = ("spectrum", "reduction")
#: Where Gram matrices are multiplied, if not in this process.
ELSEWHERE: tuple[Group, ...] = ("reduction on a GPU or cluster",)


def add_options(parser: argparse.ArgumentParser, *groups: Group) -> None:
    """Add the options of `groups`, each under its heading."""
    for group in groups:
        heading = parser.add_argument_group(group)
        for field, option in OPTIONS.items():
            if option.group == group:
                add_option(heading, field)


def add_option(parser: Any, field: str, **changes: Any) -> None:
    """Add one option to a parser or a group of it; one that is not given stays `None`.

    Args:
        parser: or a group of it.
        field: the option's name in Python.
        **changes: other keywords of `add_argument`, where a command means something else by the option.
    """
    option = OPTIONS[field]
    name = option.name or field
    keywords: dict[str, Any] = {"dest": field, "default": None, "help": option.description.replace("%", "%%")}
    if option.kind.nargs == 0:
        keywords |= {"action": "store_const", "const": option.kind.const}
    else:
        keywords |= {"type": option.kind.parse, "nargs": option.kind.nargs, "const": option.kind.const}
        keywords["metavar"] = option.metavar or name.upper()
    parser.add_argument(f"--{name.replace('_', '-')}", **keywords | changes)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes."""
    parser.add_argument("--json", action="store_true", help="print what a program can read")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, and no plan before a run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_collection_options(parser: argparse.ArgumentParser, *, verbose: bool = False) -> None:
    """Add model, data and everything that decides the gradients; with `verbose`, how much is said of the plan."""
    if verbose:
        parser.add_argument("--verbose", action="store_true", help="the plan with its stages and alternatives")
    for place in ("model", "data"):
        parser.add_argument(place, metavar=place.upper(), nargs="?", help=OPTIONS[place].description)
    add_option(parser, "out")
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="options from a .yaml, .toml or .json file; the command line wins",
    )
    add_options(parser, *COLLECTION)


def add_deep_options(parser: argparse.ArgumentParser) -> None:
    """Add what `verify --deep` takes: how many samples, and the model and data that the run was made with."""
    group = add_model_options(parser, "deep", "for --deep: as the run was given it")
    group.add_argument(
        "--deep",
        type=int,
        default=None,
        metavar="K",
        help="compute the gradients of K random samples again with the model, and compare",
    )
    group.add_argument("--seed", type=int, default=0, help="of the choice of samples (default: %(default)s)")


def add_model_options(parser: argparse.ArgumentParser, title: str, purpose: str) -> argparse._ArgumentGroup:
    """Add the model and data that a run was made with, where gradients are formed again; return their group."""
    for place in ("model", "data"):
        parser.add_argument(place, metavar=place.upper(), nargs="?", help=purpose)
    group = parser.add_argument_group(title)
    add_option(group, "field")
    add_option(group, "tokenizer_spec", help="as the run was given it (default: the model's own)")
    add_option(group, "device", help="auto, cpu, cuda, cuda:1 (default: that of the run)")
    add_option(group, "device_map", help="spread a large model, as for `run`")
    add_option(group, "trust_remote_code")
    return group
