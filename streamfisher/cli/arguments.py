"""The command line's arguments, made of the options: `config/sections.py` and `RunOptions` define them."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from streamfisher.blocks.structures import STRUCTURES
from streamfisher.cli.options import RunOptions
from streamfisher.config import SpectralConfig, option_of


def add_options(target: Any, group: str) -> None:
    """Add all options of a group to a parser, or to a group of one; what is not given stays `None`."""
    own = [item for item in dataclasses.fields(RunOptions) if "option" in item.metadata]
    for item in (*own, *dataclasses.fields(SpectralConfig)):
        known = option_of(item)
        if known.group == group:
            flag = known.flag or f"--{item.name.replace('_', '-')}"
            target.add_argument(flag, dest=item.name, default=None, help=known.help, **known.argument)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes."""
    parser.add_argument("--json", action="store_true", help="print what a program can read")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_collection_options(parser: argparse.ArgumentParser) -> None:
    """Add model, data and everything that decides the gradients."""
    own = {item.name: option_of(item) for item in dataclasses.fields(RunOptions) if "option" in item.metadata}
    for name in ("model", "data"):
        parser.add_argument(name, metavar=name.upper(), nargs="?", help=own[name].help)
    parser.add_argument("--out", default=None, metavar="RUN.zarr", help=own["out"].help)
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="options from a .yaml, .toml or .json file; the command line wins",
    )
    for group in ("data", "gradients", "store"):
        add_options(parser.add_argument_group(group), group)


def add_deep_options(parser: argparse.ArgumentParser) -> None:
    """Add what `verify --deep` takes: how many samples, and the model and data that the run was made with."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="for --deep: as the run was given it")
    parser.add_argument("data", metavar="DATA", nargs="?", help="for --deep: as the run was given it")
    group = parser.add_argument_group("deep")
    group.add_argument(
        "--deep",
        type=int,
        default=None,
        metavar="K",
        help="compute the gradients of K random samples again with the model, and compare",
    )
    group.add_argument("--seed", type=int, default=0, help="of the choice of samples (default: %(default)s)")
    group.add_argument("--field", default="text", help="of a .jsonl that holds the text (default: %(default)s)")
    group.add_argument("--tokenizer", default=None, help="as the run was given it (default: the model's own)")
    group.add_argument("--device", default=None, help="auto, cpu, cuda, cuda:1 (default: that of the run)")
    group.add_argument("--device-map", default=None, metavar="MAP", help="spread a large model, as for `run`")
    group.add_argument("--trust-remote-code", action="store_true", help="run code of a checkpoint")


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add where Gram matrices are multiplied."""
    add_options(parser.add_argument_group("reduction"), "reduction")


def add_product_options(group: Any) -> None:
    """Add to a parser or a group of it how Gram matrices are multiplied."""
    add_options(group, "products")


def add_analysis_options(parser: argparse.ArgumentParser) -> None:
    """Add what decides the spectrum of given gradients."""
    group = parser.add_argument_group("spectrum")
    group.add_argument(
        "--blocks",
        dest="block_structure",
        default=None,
        metavar="LIST",
        help=f"one or more of {','.join(STRUCTURES)}, with commas (default: layer), or a file: pattern -> block",
    )
    group.add_argument(
        "--center",
        dest="center_gradients",
        nargs="?",
        const="yes",
        default=None,
        metavar="no|yes|both",
        help="subtract the mean gradient: the covariance instead of the Fisher",
    )
    add_product_options(group)
    add_options(group, "spectrum")
