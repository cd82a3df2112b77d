"""Which gradients are taken, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from streamfisher.config.kinds import DTYPE, FLAG, PATTERNS, dtype_among, one_of, whole
from streamfisher.config.option import Section, documented, option

LossName = Literal["causal", "token", "classification", "regression", "model"]
OnNonfinite = Literal["raise", "skip"]


@documented
@dataclass(frozen=True, kw_only=True)
class GradientOptions(Section):
    """Which loss, of which parameters, in which precision, and how gradients are guarded."""

    loss: LossName | None = option(
        None,
        one_of(None, *get_args(LossName)),
        "causal, token, classification, regression, model",
        group="gradients",
        unset="chosen from output and labels, and named in the result",
    )
    include: tuple[str, ...] = option(
        (), PATTERNS, "only parameters that match", group="gradients", metavar="PATTERN", unset="all trainable ones"
    )
    exclude: tuple[str, ...] = option(
        (), PATTERNS, "all but parameters that match; listed in the result", group="gradients", metavar="PATTERN"
    )
    dtype_model: torch.dtype | None = option(
        None, DTYPE, "cast the model", name="dtype", group="gradients", unset="as it comes"
    )
    dtype_compute: torch.dtype = option(
        torch.float32,
        dtype_among(torch.float32, torch.float64),
        "of gradient rows, float32 or float64; a float64 model always gives float64",
        name="compute_dtype",
    )
    on_nonfinite: OnNonfinite = option(
        "raise",
        one_of(*get_args(OnNonfinite)),
        "at a NaN loss or gradient: raise, or skip: leave out, count and name",
        group="gradients",
    )
    guard_every: int = option(
        64,
        whole(0),
        "twice in so many units, rows are held against the gradient of their batch; 0: never",
    )
    use_deterministic: bool = option(
        False,
        FLAG,
        "the same bits every time, on CUDA too; torch's global state is restored",
        name="deterministic",
        group="gradients",
    )
