"""How lines of blocks are told apart, with colours and without: depth by colour, everything else by dashes.

Layers take a sequential scale whose lightness rises with depth, so that it survives print in grey and colour blindness;
what is no layer (embedding, output) is black and dashed, each kind in its own way in every picture.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from streamfisher.blocks.structures import layer_key, module_key

Dashes = str | tuple[float, tuple[float, ...]]

#: Okabe and Ito's colours, told apart by the colour-blind; for what has no depth.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: No two alike, so that as many lines differ without colours.
DASHES: tuple[Dashes, ...] = (
    "-",
    (0, (9, 3)),
    (0, (5, 1.5, 1, 1.5, 1, 1.5)),
    (0, (4, 2)),
    (0, (1, 1.5)),
    (0, (6, 2, 1, 2)),
    (0, (2.5, 1)),
    (0, (12, 2, 3, 2)),
)
#: The same in every picture, whatever else is in it.
_KINDS = dict(zip(("attention", "mlp", "normalization", "embedding", "output", "other"), DASHES, strict=False))
#: So many layers have their numbers on their lines, and need no colour bar.
FEW_LAYERS = 8


@dataclass(frozen=True)
class LineStyle:
    """How the line of one block is drawn."""

    colour: str
    dashes: Dashes
    width: float
    depth: int | None = None  # the number of its layer


def depth_of(name: str) -> int | None:
    """Return the number of the layer that a block or a parameter is (in); `None` for what is in none."""
    found = re.search(r"(?:^|_)layer_(\d+)$", name) or re.search(r"(?:^|_)layer_(\d+)$", layer_key(name))
    return None if found is None else int(found.group(1))


def kind_of(name: str) -> str:
    """Return the kind of module that a parameter is of; the name itself, where it is a block's, without the layer."""
    if "." in name:
        return module_key(name) if depth_of(name) is not None or layer_key(name) == "other" else layer_key(name)
    return re.sub(r"_?layer_\d+$", "", name) if depth_of(name) is not None else name


def depth_scale(names: Iterable[str]) -> Any | None:
    """Return the colours of layers, a matplotlib `ScalarMappable`; `None` where fewer than two have a depth."""
    depths = sorted({depth for name in names if (depth := depth_of(name)) is not None})
    if len(depths) < 2:
        return None
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    without_yellow = [0.84 * i / 255 for i in range(256)]  # its pale end is lost on paper
    shades = ListedColormap(colormaps["viridis"](without_yellow), name="depth")
    return ScalarMappable(Normalize(depths[0], depths[-1]), shades)


def line_styles(names: Iterable[str]) -> dict[str, LineStyle]:
    """Return how each of these blocks is drawn beside the others."""
    from matplotlib.colors import to_hex

    names = list(names)
    scale = depth_scale(names)
    free = itertools.cycle([dashes for dashes in DASHES if dashes not in _KINDS.values()] + list(DASHES))
    given: dict[str, Dashes] = {}
    styles: dict[str, LineStyle] = {}
    for name in names:
        kind, depth = kind_of(name), depth_of(name)
        if kind not in given:
            given[kind] = _KINDS[kind] if kind in _KINDS else "-" if depth is not None and not kind else next(free)
        if scale is not None and depth is not None:
            styles[name] = LineStyle(to_hex(scale.to_rgba(depth)), given[kind], 1.3, depth)
        elif scale is not None:
            styles[name] = LineStyle("#000000", given[kind], 1.7)
        else:
            number = list(given).index(kind)
            styles[name] = LineStyle(COLOURS[number % len(COLOURS)], given[kind], 1.5, depth)
    return styles
