"""How many Grams a run keeps, and which block structures can still be answered from them.

A Gram per parameter answers every question and takes `8 N^2` bytes each. Grams add, so parameters may share one: then
only block structures remain whose blocks are unions of what was added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from streamfisher.blocks.structures import STRUCTURES, assign_blocks, group_blocks, module_key
from streamfisher.config import GramPer
from streamfisher.errors import ConfigError

_WHOLE = "all"


def gram_groups(parameters: Iterable[str], per: str) -> dict[str, str]:
    """Return `{parameter: group}`: its own name, `layer_3.attention`, `layer_3`, or `all`.

    Args:
        parameters: all names of the model, in its order: whether it has two stacks of layers shows only in all of them.
        per: 'parameter', 'layer-module', 'layer' or 'all'.

    Raises:
        ConfigError: `per` is unknown.
    """
    names = list(parameters)
    if per not in get_args(GramPer):
        raise ConfigError(f"gram_per={per!r} is unknown; choose one of {', '.join(get_args(GramPer))}.")
    if per == "parameter":
        return {name: name for name in names}
    if per == "all":
        return dict.fromkeys(names, _WHOLE)
    layers = assign_blocks(names, "layer")
    return layers if per == "layer" else {name: f"{layers[name]}.{module_key(name)}" for name in names}


def gram_keys(
    parameters: Iterable[str], per: str, waves: Sequence[Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """Return `{gram key: [parameters]}`, in the order of their first parameters.

    A Gram is finished within one wave, so a group whose parameters are captured in several has one Gram in each:
    `layer_3` in a single wave, `layer_3@1` and `layer_3@2` in waves 1 and 2.

    Args:
        parameters: all names, in the model's order.
        per: 'parameter', 'layer-module', 'layer' or 'all'.
        waves: the parameters of each wave; `None` means a single one.

    Raises:
        ConfigError: `per` is unknown.
    """
    groups = gram_groups(parameters, per)
    if waves is None or per == "parameter":
        return group_blocks(groups)
    found = {
        group: [wave for wave, names in enumerate(waves) if group in {groups[name] for name in names}]
        for group in dict.fromkeys(groups.values())
    }
    keys: dict[str, list[str]] = {}
    for wave, names in enumerate(waves):
        for name in names:
            group = groups[name]
            keys.setdefault(group if len(found[group]) == 1 else f"{group}@{wave}", []).append(name)
    return keys


def possible_structures(keys: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the named block structures whose blocks are unions of the Grams that are kept."""
    names = [name for members in keys.values() for name in members]
    return [structure for structure in STRUCTURES if not _divided(keys, assign_blocks(names, structure))]


def check_grouping(
    keys: Mapping[str, Sequence[str]], assignment: Mapping[str, str], *, per: str | None = None
) -> dict[str, str]:
    """Return `{gram key: block key}` for blocks that are unions of the Grams that are kept.

    Args:
        keys: the parameters of each Gram of the run.
        assignment: block key of each parameter.
        per: the granularity the run was made with, for the message.

    Raises:
        ConfigError: a Gram holds parameters of two blocks; the message names it, and what is possible.
    """
    divided = _divided(keys, assignment)
    if divided:
        key = next(iter(divided))
        blocks = divided[key]
        kept = f"one Gram per {per}" if per not in (None, "all") else ("a single Gram" if len(keys) == 1 else "Grams")
        more = f" (and {len(divided) - 1} more)" if len(divided) > 1 else ""
        raise ConfigError(
            f"this run keeps {kept}, and the Gram {key}{more} holds parameters of the blocks {' and '.join(blocks[:3])}"
            f"{' and others' if len(blocks) > 3 else ''}. Possible: {', '.join(possible_structures(keys))}, or "
            "patterns that put all of a Gram into one block. A finer --gram-per needs the gradients again."
        )
    return {key: assignment[members[0]] for key, members in keys.items()}


def layers_of(keys: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return `{gram key: layer}`; a Gram that holds parameters of several layers is one of its own."""
    layers = assign_blocks([name for members in keys.values() for name in members], "layer")
    divided = _divided(keys, layers)
    return {key: key if key in divided else layers[members[0]] for key, members in keys.items()}


def _divided(keys: Mapping[str, Sequence[str]], assignment: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the Grams whose parameters lie in more than one block, with those blocks."""
    found = {key: list(dict.fromkeys(assignment[name] for name in members)) for key, members in keys.items()}
    return {key: blocks for key, blocks in found.items() if len(blocks) > 1}
