"""Whether a parameter's gradients are held as rows or as factors, and what that takes on disk and in memory.

A row of a linear layer has `d_out d_in` numbers, its factors `T (d_out + d_in)`: for sequences that are not very long
far fewer, and in a model's own dtype exact, because they are what autograd itself multiplies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from streamfisher.errors import ConfigError
from streamfisher.gradients.shapes import GradientShape

Representation = Literal["dense", "factors"]

#: Tensors of fewer elements are held as rows: factors would save nothing worth an array for each batch.
SMALL = 65536


def choose_representation(
    shapes: Sequence[GradientShape], choice: str, *, row_itemsize: int, centered: bool = False
) -> dict[str, Representation]:
    """Return how each parameter is held.

    Args:
        shapes: of all parameters.
        choice: 'dense', 'factors' (wherever there are any) or 'auto': the smaller of the two.
        row_itemsize: bytes of a stored number of a row.
        centered: rows are stored less their mean, which factors cannot be.

    Raises:
        ConfigError: factors of centered rows are asked for.
    """
    if choice == "factors" and centered:
        raise ConfigError("representation='factors' holds gradients as they are; with store_centered=True use 'dense'.")
    if choice == "dense" or centered:
        return {shape.name: "dense" for shape in shapes}
    sharers = Counter(key for shape in shapes for key in {side.key for pair in shape.pairs for side in pair})
    chosen: dict[str, Representation] = {}
    for shape in shapes:
        as_factors = bool(shape.pairs) and shape.projected is None
        if choice == "auto":
            as_factors = as_factors and shape.numel >= SMALL
            as_factors = as_factors and _factor_share(shape, sharers) < shape.numel * row_itemsize
        chosen[shape.name] = "factors" if as_factors else "dense"
    return chosen


def _factor_share(shape: GradientShape, sharers: Mapping[str, int]) -> float:
    """Return the bytes of one sample's factors, a shared side divided among those that share it."""
    return sum(
        positions * side.width * side.itemsize / sharers[side.key]
        for pair, positions in zip(shape.pairs, shape.positions, strict=True)
        for side in pair
    )


def sample_bytes(
    shapes: Sequence[GradientShape], chosen: Mapping[str, Representation], row_itemsize: int
) -> tuple[int, float]:
    """Return the bytes of one sample of these parameters: of its rows, and of its factors, what is shared once."""
    rows = sum(shape.columns * row_itemsize for shape in shapes if chosen[shape.name] == "dense")
    sides: dict[str, float] = {}
    for shape in shapes:
        if chosen[shape.name] == "factors":
            for pair, positions in zip(shape.pairs, shape.positions, strict=True):
                sides |= {side.key: positions * side.width * side.itemsize for side in pair}
    return rows, sum(sides.values())
