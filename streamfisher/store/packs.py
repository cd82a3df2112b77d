"""Small parameters side by side in one array, so that a unit of many of them is a few files and not thousands.

    packed/<wave>-<number>   (N, sum P_k)   rows of the parameters that `layout.packs` lists, in that order

A pack holds parameters of one wave which are all kept or all deleted. Its chunk is one unit high and all columns wide.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamfisher.store.names import node_name

#: Parameters whose chunk is of fewer bytes are packed, where a wave has so many of them.
SMALL_BYTES = 1 << 20
LEAST_SMALL = 16
#: Bytes of a chunk of a pack, and of all its rows, which are read at once and kept while its parameters are reduced.
_PACK_BYTES = 4 << 20
PACK_SLAB_BYTES = 64 << 20


@dataclass(frozen=True)
class RowPlace:
    """Where the rows of a parameter are."""

    array: str  # below the run's folder
    first: int = 0  # column
    pack: str | None = None  # key of the pack that they are in


def make_packs(
    columns: Mapping[str, int],
    waves: Sequence[Sequence[str]],
    kept: Mapping[str, bool],
    *,
    n_samples: int,
    chunk_rows: int,
    itemsize: int,
) -> dict[str, list[str]]:
    """Return `{key: parameters}` of the packs of a new run.

    Args:
        columns: parameter -> numbers of a row, of those that are held as rows.
        waves: parameters of each pass.
        kept: parameter -> whether its gradients stay.
        n_samples: N.
        chunk_rows: samples of a unit.
        itemsize: bytes of a stored number.
    """
    packs: dict[str, list[str]] = {}
    widest = min(_PACK_BYTES // (chunk_rows * itemsize), PACK_SLAB_BYTES // (4 * n_samples))
    for wave, names in enumerate(waves):
        small = [name for name in names if name in columns and chunk_rows * columns[name] * itemsize < SMALL_BYTES]
        if len(small) < LEAST_SMALL:
            continue
        number = itertools.count()
        for stays in (True, False):
            group: list[str] = []
            for name in [*(name for name in small if kept[name] == stays), None]:
                if name is None or sum(columns[one] for one in group) + columns[name] > widest:
                    if len(group) > 1:
                        packs[f"{wave}-{next(number)}"] = group
                    group = []
                if name is not None:
                    group.append(name)
    return packs


def places_of(parameters: Mapping[str, int], packs: Mapping[str, Sequence[str]]) -> dict[str, RowPlace]:
    """Return where the rows of each parameter are.

    Args:
        parameters: parameter -> numbers of a row.
        packs: of the run.
    """
    places = {name: RowPlace(f"gradients/{node_name(name)}") for name in parameters}
    for key, names in packs.items():
        first = 0
        for name in names:
            places[name] = RowPlace(f"packed/{key}", first, key)
            first += parameters[name]
    return places
