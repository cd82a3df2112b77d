"""How Gram matrices become spectra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from streamfisher.config.kinds import FLAG, NUMBER, SOLVER_DEVICE, dtype_among, one_of, optional, whole
from streamfisher.config.option import Section, documented, option
from streamfisher.errors import ConfigError

Solver = Literal["auto", "dense", "iterative"]


@documented
@dataclass(frozen=True, kw_only=True)
class SolvingOptions(Section):
    """Of which blocks eigenvalues are computed, how many, and how exactly."""

    block_structure: str = option(
        "layer",
        one_of("layer", "module", "parameter", "none"),
        "blocks whose spectra are computed: layer, module, parameter, none (the whole)",
    )
    center_gradients: bool = option(False, FLAG, "subtract the mean gradient: the covariance instead of the Fisher")
    eps: float | None = option(
        None,
        optional(NUMBER),
        "raise the noise floor to so much of the largest eigenvalue",
        group="spectrum",
        unset="what rounding leaves",
    )
    solver: Solver = option(
        "auto",
        one_of(*get_args(Solver)),
        "dense; iterative: the largest eigenvalues only, with residuals; auto: iterative where it pays",
        group="spectrum",
    )
    top_k_eigenvalues: int = option(100, whole(1), "how many eigenvalues the metrics list")
    max_params_per_block: int | None = option(
        None, optional(whole(1)), "draw so many parameters of a block with the seed, and rescale", unset="all, exact"
    )
    regularization: float = option(
        1e-8, optional(NUMBER), "jitter, relative to the mean eigenvalue; only if the solver fails"
    )
    dtype_eigensolve: torch.dtype = option(
        torch.float64, dtype_among(torch.float32, torch.float64), "of the eigensolve, float32 or float64"
    )
    eigensolve_device: str = option(
        "auto",
        SOLVER_DEVICE,
        "where it is solved: auto, cpu, cuda, cuda:1; mps, which has no such solver, is cpu",
        group="spectrum",
    )

    def check(self) -> None:
        """Refuse a jitter that is negative, and a noise floor above everything."""
        if self.regularization is None or not 0 <= self.regularization < float("inf"):
            raise ConfigError(f"regularization={self.regularization} must be a number and not negative.")
        if self.eps is not None and not 0 <= self.eps < 1:
            raise ConfigError(f"eps={self.eps} is relative to the largest eigenvalue and must lie in [0, 1).")
