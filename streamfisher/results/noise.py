"""Below which eigenvalue rounding decides: of the products, the solver, the rows and the backward pass.

Everything is in units of the Fisher F: eigenvalues of a Gram over N, traces over N, weights counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: One percent of error is reached where an eigenvalue is this many times the variance that rounding the rows added.
_ROUNDING_MARGIN = 100.0
#: Centering takes the means of rows and columns and their mean from an entry: four times its rounding at most.
_CENTERING = 4.0


@dataclass(frozen=True)
class RawScale:
    """How large a block is before its mean is subtracted: what rounding is relative to.

    Centering subtracts large numbers where the mean dominates, and heavy weights make the mean almost a sample of its
    own; the rounding of what was subtracted stays.
    """

    trace: float  # of the block, weighted, not centered
    single: float  # part of it whose Grams are products in `dtype_gram`, not in float64
    all_single: bool  # that is the whole block
    centered: bool  # the mean was subtracted after the products were made


@dataclass(frozen=True)
class Floor:
    """An eigenvalue below which rounding decides, and what decides there."""

    value: float
    source: str
    error: float  # absolute error of an eigenvalue by products, solver and rounding of stored rows


def noise_floor(
    largest: float,
    trace: float,
    n_samples: int,
    *,
    product: torch.dtype,
    roundoff: float,
    eps: float | None = None,
    raw: RawScale | None = None,
    solve: torch.dtype = torch.float64,
) -> Floor:
    """Return the eigenvalue below which rounding decides: the largest of these.

    - Products leave about `eps N lambda_1`, each in its own precision: those in float32 no more than
      `eps(float32) N min(lambda_1, trace_32)`, `trace_32` being the part of the trace that they make. Of centered
      rows it is at least `4 eps` times the trace before centering.
    - The solver leaves `eps N lambda_1`.
    - Rows rounded with unit roundoff u add a white spectrum of `u^2 trace / N` (before centering), which is 1 % at a
      hundred times that.
    - `eps lambda_1`, where that is asked for: it raises the floor and never lowers it.

    Args:
        largest: lambda_1.
        trace: of the same matrix.
        n_samples: N.
        product: dtype of the slab products of parameters that are not multiplied in float64.
        roundoff: u, of the rows as they are held.
        eps: a floor relative to lambda_1, where it is higher.
        raw: the block before centering; `None`: as it is, all of it in `product`.
        solve: dtype of the eigensolver.
    """
    n = max(n_samples, 1)
    raw = RawScale(trace, trace, True, False) if raw is None else raw
    single = largest if raw.all_single else min(largest, raw.single)
    candidates, error = [], 0.0
    for dtype, share, before in ((product, single, raw.single), (torch.float64, largest, raw.trace)):
        before = before if raw.centered else 0.0
        unit = float(torch.finfo(dtype).eps)
        candidates.append((unit * max(n * share, _CENTERING * before), f"{_name(dtype)} products"))
        error = max(error, unit * max(share, before))
    if solve != torch.float64:
        unit = float(torch.finfo(solve).eps)
        candidates.append((unit * n * largest, f"{_name(solve)} eigensolver"))
        error = max(error, unit * largest)
    rounding = roundoff**2 * max(trace, raw.trace) / n
    candidates.append((_ROUNDING_MARGIN * rounding, "rounding of the rows"))
    if eps is not None:
        candidates.append((eps * largest, "eps"))
    value, source = max(candidates, key=lambda candidate: candidate[0])
    return Floor(value, source if value > 0 else "nothing", error + rounding)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def backward_noise(computed: torch.dtype, reach: float, whole: float) -> float:
    """Return the eigenvalue that rounding in the backward pass can make up: u^2 times the trace of what reaches there.

    Some gradients are zero in exact arithmetic and rounding in practice (a bias added to every key of an attention
    layer, which the softmax cancels). Their spectrum has a shape like any other; only its size tells, against that of
    the layer whose output gradients they are sums of. A layer that is no larger than what rounding of the whole model
    could make may itself be nothing else, and is held against the whole.

    Args:
        computed: dtype of the backward pass; u is its unit roundoff.
        reach: trace of the layers that the block's parameters belong to, before centering.
        whole: of all parameters.
    """
    eps = float(torch.finfo(computed).eps)
    return (eps / 2) ** 2 * (reach if reach > eps**2 * whole else whole)
