"""What a spectrum costs in floating-point operations: pure functions of shapes and numbers of samples.

N samples of T positions; a parameter of shape (m, n) has P = m n elements. A multiplication and an addition count as
two operations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from streamfisher.gradients.shapes import GradientShape
from streamfisher.planning.model_trace import BlockCost
from streamfisher.reduction.kernels import FLOAT64_COST, Kernel, cheapest_kernel, kernel_operations


@dataclass(frozen=True)
class ProductCost:
    """The Gram of one parameter, by the cheapest kernel, in operations that count as float32 ones."""

    kernel: Kernel
    forming: float  # operations that make rows of factors
    product: float  # operations of the symmetric product

    @property
    def total(self) -> float:
        """Return the sum."""
        return self.forming + self.product


def forming_flops(shapes: Collection[GradientShape], held: Mapping[str, str], how: str) -> float:
    """Return the operations that form one sample's rows of the parameters that are held so: `2 T P` for each product.

    Of dense ones while the backward pass runs; of factors where the guard adds them up.
    """
    return sum(
        2.0 * positions * shape.numel
        for shape in shapes
        if held[shape.name] == how
        for (left, _), positions in zip(shape.pairs, shape.positions, strict=True)
        if left.width > 1
    )


def norm_flops(shapes: Collection[GradientShape], held: Mapping[str, str]) -> float:
    """Return the operations, in float64, that find one sample's squared norms where gradients are held as factors.

    Over the positions, `2 T^2 (m + n)`, or by forming the product where that is fewer, `2 T m n`.
    """
    total = 0.0
    for shape in shapes:
        if held[shape.name] == "dense":
            continue
        positions, width = sum(shape.positions), shape.pairs[0][1].width
        height = shape.numel / width
        by_id = any(left.width == 1 for left, _ in shape.pairs)
        if not by_id and positions * (height + width) > 2 * shape.numel:
            total += 2.0 * positions * shape.numel
        else:
            pairs = zip(shape.pairs, shape.positions, strict=True)
            total += positions * sum(
                2.0 * own * (right.width + (0 if left.width == 1 else left.width)) for (left, right), own in pairs
            )
    return total


def product_cost(shape: GradientShape, held: str, n_samples: int, single: bool = True) -> ProductCost:
    """Return what the Gram of a parameter costs, whose rows are multiplied in float32 where `single`.

    Rows: `N^2 P`, a symmetric product. Of factors, rows are formed first (slabs, `2 N T P`), or all positions are
    multiplied with all (pairwise, `(N T)^2 (m + n)`), or, for an embedding, those of the same token (at most
    `N^2 T n`).
    """
    rows = float(n_samples) ** 2 * shape.columns
    if held == "dense":
        return ProductCost("slabs", 0.0, rows)
    positions = n_samples * sum(shape.positions)
    width = shape.pairs[0][1].width
    by_token = all(left.width == 1 for left, _ in shape.pairs)
    matrix = (shape.numel // width, width)
    kernel = cheapest_kernel(positions, matrix, n_samples, by_token=by_token, single=single)
    if kernel == "tokens":
        return ProductCost("tokens", 0.0, positions * n_samples * width)
    if kernel == "slabs":
        return ProductCost("slabs", 2.0 * positions * shape.numel, rows)
    _, pairwise = kernel_operations(positions, matrix, n_samples)
    return ProductCost("pairwise", 0.0, FLOAT64_COST * pairwise)


def eigensolve_flops(n_samples: int) -> float:
    """Return `(4/3) N^3`, the reduction to tridiagonal form; the eigenvalues of that cost little more."""
    return 4.0 / 3.0 * float(n_samples) ** 3


def pass_flops(blocks: Sequence[BlockCost], names: Collection[str]) -> float:
    """Return the operations of one sample's pass that captures `names`: forward, and backward to the lowest of them.

    Parameters are frozen, so backward forms input gradients only and costs as much as the forward of what it crosses.
    """
    wanted = set(names)
    lowest = next((i for i, block in enumerate(blocks) if wanted.intersection(block.parameters)), len(blocks))
    return sum(block.forward_flops for block in blocks) + sum(block.forward_flops for block in blocks[lowest:])


def streamed_flops(blocks: Sequence[BlockCost], every: int, waves: Sequence[Collection[str]] = ()) -> float:
    """Return the operations of one sample when layers are streamed: forward, then forward and backward of each layer.

    Args:
        blocks: in the order in which they are called.
        every: only every so-maniest boundary is kept; the layers in between are run forward once more.
        waves: names of parameters; a layer that is taken in several waves is replayed for each.
    """
    forward = sum(block.forward_flops for block in blocks)
    again = 0.0
    for block in blocks:
        parts = sum(not wave.isdisjoint(block.parameters) for wave in map(set, waves))
        again += 2.0 * max(parts - 1, 0) * block.forward_flops
    return forward * (3.0 + (every - 1) / every) + again


def plain_flops(blocks: Sequence[BlockCost]) -> float:
    """Return the operations of one sample's plain forward and backward with weight gradients: three forwards."""
    return 3.0 * sum(block.forward_flops for block in blocks)
