"""Blocks to the whole: the union of eigenvalues, and how far the block-diagonal matrix is from the full one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from streamfisher.results.noise import backward_noise
from streamfisher.results.spectrum import BlockSpectrum, Spectrum

#: Centering by H K H with float32 products loses digits in proportion to N |mean|^2 over the trace of the covariance;
#: at this ratio the error of an eigenvalue reaches about 1e-4.
MEAN_DOMINANCE_LIMIT = 1000.0


def union(blocks: Mapping[str, BlockSpectrum], top_k: int) -> BlockSpectrum:
    """Return the spectrum of the block-diagonal Fisher: the union of the blocks' eigenvalues, never an average.

    Where blocks list their k largest only, the k largest of the union are known, and no more of them are listed.
    """
    members = list(blocks.values())
    if len(members) == 1:
        only = members[0]
        return dataclasses.replace(only, name="global")
    values = np.concatenate([block.eigenvalues for block in members])
    above = np.concatenate([block.above_floor for block in members])
    residuals = np.concatenate(
        [np.zeros(len(block.eigenvalues)) if block.residuals is None else block.residuals for block in members]
    )
    errors = np.concatenate([block.relative_errors for block in members])
    order = np.argsort(values, kind="stable")[::-1]
    cut = [len(block.eigenvalues) for block in members if block.truncated]
    order = order[: min(cut)] if cut else order
    highest = max(members, key=lambda block: block.noise_floor)
    return BlockSpectrum(
        "global",
        values[order],
        float(sum(block.trace for block in members)),
        highest.noise_floor,
        above[order],
        members[0].n_samples,
        sum(block.n_params for block in members),
        truncated=any(block.truncated for block in members),
        solver=", ".join(sorted({block.solver for block in members})),
        jitter=max(block.jitter for block in members),
        roundoff=max(block.roundoff for block in members),
        top_k=top_k,
        norm=math.hypot(*(block.norm or 0.0 for block in members)),
        residuals=residuals[order] if any(block.residuals is not None for block in members) else None,
        solved_side=", ".join(sorted({block.solved_side for block in members})),
        floor_source=highest.floor_source,
        block_errors=errors[order],
    )


def combine(
    blocks: Mapping[str, BlockSpectrum],
    reach: Mapping[str, float],
    whole_trace: float,
    computed: torch.dtype,
    facts: dict[str, Any],
    top_k: int,
    whole: BlockSpectrum | None = None,
) -> Spectrum:
    """Return the spectrum of solved blocks, with the floor that the backward pass puts under each of them.

    Args:
        blocks: solved, in order.
        reach: block -> trace, before centering, of the layers that its parameters belong to.
        whole_trace: of the Fisher of all parameters together, before centering.
        computed: dtype of the backward pass.
        facts: metadata of the result.
        top_k: how many eigenvalues the metrics of the whole list.
        whole: all parameters together, where that was solved.
    """
    blocks = {
        key: dataclasses.replace(block, row_scale=max(reach[key] - block.trace, block.row_scale)).with_floor(
            backward_noise(computed, reach[key], whole_trace), "rounding of the backward pass"
        )
        for key, block in blocks.items()
    }
    if whole is not None:
        row_scale = max(whole_trace - whole.trace, whole.row_scale)
        floor = backward_noise(computed, whole_trace, whole_trace)
        whole = dataclasses.replace(whole, row_scale=row_scale).with_floor(floor, "rounding of the backward pass")
        if all(block.no_gradient for block in blocks.values()):
            whole = dataclasses.replace(whole, no_gradient=True, reason=next(iter(blocks.values())).reason)
    return Spectrum(blocks, union(blocks, top_k), facts, solved_whole=whole)


def block_diagonal_error(blocks_squared: float, whole_squared: float) -> float | None:
    """Return the relative Frobenius error of the block-diagonal approximation, |F - blockdiag F| / |F|.

    `|F|^2 = |K|^2 / N^2` and `|blockdiag F|^2 = sum_b |K_b|^2 / N^2`, both exact.

    Args:
        blocks_squared: sum over blocks of the squared Frobenius norm of their Grams.
        whole_squared: squared Frobenius norm of the Gram of all parameters.
    """
    if whole_squared <= 0:
        return None
    return math.sqrt(max(whole_squared - blocks_squared, 0.0) / whole_squared)
