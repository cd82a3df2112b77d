"""Spectra of gradients that are in memory: given by the user, or collected there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamfisher.blocks.structures import assign_blocks, group_blocks
from streamfisher.config import SpectralConfig
from streamfisher.errors import DataError
from streamfisher.reduction.gram import ParameterGram, build_grams
from streamfisher.reduction.subsets import draw_columns
from streamfisher.results.spectrum import Spectrum
from streamfisher.sinks.interface import GradientSource
from streamfisher.sinks.memory_source import MemoryRows
from streamfisher.solving.combine import union
from streamfisher.solving.selection import select
from streamfisher.solving.solve import Eigenproblem, RowPrecision, solve_blocks


def spectrum_of_gradients(gradients: Sequence[Mapping[str, Tensor]], config: SpectralConfig) -> Spectrum:
    """Solve gradients that were computed elsewhere; each block of the samples that have it, wholly."""
    names = list(dict.fromkeys(name for sample in gradients for name in sample))
    facts = {
        "n_samples_stored": len(gradients),
        "sample_unit": config.sample_unit,
        "loss_reduction": "precomputed gradients",
        "seed": config.seed,
    }
    holders = _holders(gradients, group_blocks(assign_blocks(names, config.block_structure)))
    if all(len(numbers) == len(gradients) for numbers in holders.values()):
        return _solve(_rows_of(gradients, names, range(len(gradients)), config), config, facts)
    assignment = assign_blocks(names, config.block_structure)
    parts = {
        key: _solve(
            _rows_of(gradients, [name for name in names if assignment[name] == key], numbers, config), config, facts
        )
        for key, numbers in holders.items()
    }
    return _together(parts, len(gradients), config)


def _holders(gradients: Sequence[Mapping[str, Tensor]], blocks: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Return block -> the samples that have its parameters.

    Raises:
        DataError: a sample has part of a block, or fewer than 2 have one.
    """
    holders: dict[str, list[int]] = {key: [] for key in blocks}
    for key, members in blocks.items():
        for index, sample in enumerate(gradients):
            held = {name for name in members if name in sample}
            if not held:
                continue
            holders[key].append(index)
            first = holders[key][0]
            if different := sorted(held ^ {name for name in members if name in gradients[first]}):
                raise DataError(
                    f"gradient {index} has other parameters of the block {key} than gradient {first}: "
                    f"{', '.join(different[:5])}. A sample has all parameters of a block, or none."
                )
    for key, numbers in holders.items():
        if len(numbers) < 2:
            raise DataError(f"{len(numbers)} of {len(gradients)} gradients have the block {key}; 2 are needed.")
    return holders


def _together(parts: Mapping[str, Spectrum], n_samples: int, config: SpectralConfig) -> Spectrum:
    """Put blocks of different samples together: each has an N of its own, and nothing is known between them."""
    blocks = {key: part.blocks[key] for key, part in parts.items()}
    whole = dataclasses.replace(union(blocks, config.top_k_eigenvalues), n_samples=n_samples)
    first = next(iter(parts.values()))
    unreached = [name for part in parts.values() for name in part.metadata.get("parameters_without_gradient", [])]
    metadata = {
        **first.metadata,
        "n_samples": n_samples,
        "n_samples_per_block": {key: block.n_samples for key, block in blocks.items()},
        "block_diagonal_error": None,
        **({"parameters_without_gradient": unreached} if unreached else {}),
    }
    return Spectrum(blocks, whole, metadata)


def _rows_of(
    gradients: Sequence[Mapping[str, Tensor]], names: Sequence[str], numbers: Sequence[int], config: SpectralConfig
) -> MemoryRows:
    """Return the gradients of some samples as rows.

    Raises:
        DataError: sizes differ, or a gradient is not finite.
    """
    rows = {}
    for name in names:
        values = [torch.as_tensor(gradients[number][name]).detach().reshape(-1) for number in numbers]
        if any(value.is_meta for value in values):
            raise DataError(f"the gradients of {name} are on the meta device and have no values.")
        wide = any(value.dtype == torch.float64 for value in values)
        dtype = torch.float64 if wide else config.dtype_compute
        if len({value.numel() for value in values}) > 1:
            raise DataError(f"the gradients of {name} have different sizes: {sorted({v.numel() for v in values})}.")
        rows[name] = torch.stack([value.to("cpu", dtype) for value in values]).numpy()
        bad = np.flatnonzero(~np.isfinite(rows[name]).all(axis=1))
        if len(bad):
            raise DataError(f"gradient {numbers[bad[0]]} is not finite in {name}.")
    return MemoryRows(rows)


def _solve(rows: MemoryRows, config: SpectralConfig, facts: Mapping[str, Any]) -> Spectrum:
    built = grams_in_memory(rows, rows.parameters, config)
    return spectrum_of_grams(built, rows.parameters, rows.n_samples, rows.numpy_row_dtype, config, facts)


def grams_in_memory(rows: GradientSource, parameters: Mapping[str, int], config: SpectralConfig) -> list[ParameterGram]:
    """Build the Grams of gradients in memory, one for each of their parameters.

    Args:
        rows: the gradients, of all samples.
        parameters: columns of every parameter there is, also of those that `rows` has not: columns are drawn of all.
        config: products, workers and memory budget.
    """
    blocks = group_blocks(assign_blocks(parameters, config.block_structure))
    subsets = draw_columns(parameters, blocks, config.max_params_per_block, config.seed)
    return build_grams(rows, config, _keep, subsets=subsets)


def spectrum_of_grams(
    built: Sequence[ParameterGram],
    parameters: Mapping[str, int],
    n_samples: int,
    row_dtype: np.dtype,
    config: SpectralConfig,
    facts: Mapping[str, Any],
    parts: int = 1,
) -> Spectrum:
    """Solve the blocks that `config` asks for.

    Args:
        built: one Gram for each parameter.
        parameters: columns of each, in the model's order.
        n_samples: N.
        row_dtype: in which gradients were computed.
        config: blocks, centering and solver.
        facts: metadata of the result.
        parts: samples in a row that are one input's, and count as one.
    """
    by_name = {parameter.name: parameter.gram for parameter in built}
    computed = torch.float64 if row_dtype == np.float64 else torch.float32
    problem = Eigenproblem(
        parameters,
        assign_blocks(parameters, config.block_structure),
        config,
        center=config.center_gradients,
        precision=RowPrecision(computed, float(torch.finfo(computed).eps) / 2),
        metadata={**facts, "n_samples": n_samples, "block_structure": config.block_structure},
        single=[parameter.name for parameter in built if parameter.single],
        selection=None if parts == 1 else select(n_samples, np.ones(n_samples, dtype=bool), parts=parts),
        layers=assign_blocks(parameters, "layer"),
        whole=True,
    )
    return solve_blocks(by_name.__getitem__, problem)


def _keep(parameter: ParameterGram) -> ParameterGram:
    return parameter
