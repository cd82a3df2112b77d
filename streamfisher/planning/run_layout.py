"""What a run that is about to start will hold, and how it fits its budgets: representation, batches, waves, Grams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamfisher.blocks.gram_keys import gram_keys
from streamfisher.byte_sizes import format_bytes
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import batches_of, make_units
from streamfisher.errors import CapacityError, ConfigError
from streamfisher.gradients.shapes import GradientShape
from streamfisher.planning.held_where import cut_and_copy, cut_and_hold, held_on_disk_for, set_by, written_behind
from streamfisher.planning.representation import choose_representation, sample_bytes
from streamfisher.planning.waves import FACTOR_COPIES, WaveLimits, WaveSize, WaveSizes
from streamfisher.runtime.disk import disk_limit
from streamfisher.runtime.memory import device_room, working_memory

#: Of a memory budget, at most these shares are for the activations of a batch, and for them and its factors.
ACTIVATION_SHARE = 0.5
_BATCH_SHARE = 0.8
#: Of the disk, at most this share is for the boundaries of streamed layers.
BOUNDARY_SHARE = 0.25
#: Of the host's memory, at most these shares are for boundaries, by where gradients are held.
_BOUNDARY_MEMORY = {"device": 0.6, "host": 0.1}
#: Batches are not made smaller than this for the sake of factors; then there are more waves instead.
_LEAST_TOKENS = 512


@dataclass(frozen=True)
class RunLayout:
    """How a run is laid out; everything here is stored with it and does not change when it is resumed."""

    representation: dict[str, str]  # parameter -> 'dense' or 'factors'
    waves: list[WaveSize]
    grams: dict[str, list[str]]  # Gram key -> parameters
    keep: list[str]  # patterns of parameters whose gradients stay
    batch_tokens: int  # padded tokens of one backward pass
    gram_bytes: int  # 8 N^2 for each Gram
    hold: str = "disk"  # where gradients are until they are reduced: 'device', 'host' or 'disk'
    unit_buffers: int = 1  # units whose rows are in memory at a time, where they are written
    copy: str | None = None  # where gradients that are written are held too until they are reduced: 'device' or 'host'

    def layout(self) -> dict[str, Any]:
        """Return the part of the manifest's layout that says so, as plain JSON values."""
        return {
            "representation": self.representation,
            "waves": [list(wave.parameters) for wave in self.waves],
            "grams": self.grams,
            "keep": self.keep,
            "batch_tokens": self.batch_tokens,
            "hold": self.hold,
            "holds": self.places if any(wave.hold for wave in self.waves) else None,
            "unit_buffers": self.unit_buffers,
            "copy": self.copy,
        }

    @property
    def places(self) -> list[str]:
        """Return where the gradients of each wave are until they are reduced."""
        return [wave.hold or self.hold for wave in self.waves]

    @property
    def disk(self) -> int:
        """Return the most bytes that are on disk at one time, uncompressed, kept gradients counted in every wave."""
        if self.hold != "disk":
            return self.gram_bytes
        largest = max(wave.disk for wave in self.waves)
        return self.gram_bytes + (sum(wave.disk for wave in self.waves) if self.keep else largest)


def plan_layout(
    shapes: Sequence[GradientShape],
    lengths: Sequence[int],
    config: SpectralConfig,
    path: Path,
    *,
    row_dtype: torch.dtype,
    activations: float = 0.0,
    segments: Sequence[Sequence[str]] | None = None,
    device: torch.device | None = None,
    apart: Sequence[int] | None = None,
) -> RunLayout:
    """Decide how a new run is laid out within its budgets and what is free here: `layout_within`, which says the rest.

    Args:
        shapes: of all parameters, in the model's order.
        lengths: tokens of each sample.
        config: budgets, and everything about how gradients are held.
        path: of the run, for what is free on its disk.
        row_dtype: in which rows are computed.
        activations: bytes in host memory that a backward pass takes for each padded token.
        segments: parameters that share no wave with those of another segment.
        device: where gradients are made.
        apart: samples that share no batch, see `batches_of`.

    Raises:
        CapacityError: something does not fit.
        ConfigError: settings exclude one another.
    """
    return layout_within(
        shapes,
        lengths,
        config,
        disk=disk_limit(config, path),
        memory=working_memory(config.memory_budget),
        device_memory=None if device is None else device_room(device, config.device_memory_budget),
        row_dtype=row_dtype,
        activations=activations,
        segments=segments,
        apart=apart,
    )


def layout_within(
    shapes: Sequence[GradientShape],
    lengths: Sequence[int],
    config: SpectralConfig,
    *,
    disk: int,
    memory: int,
    row_dtype: torch.dtype,
    device_memory: int | None = None,
    activations: float = 0.0,
    segments: Sequence[Sequence[str]] | None = None,
    apart: Sequence[int] | None = None,
) -> RunLayout:
    """Decide how a run is laid out within limits, of this machine or of another: what plans and runs both ask.

    Args:
        shapes: of all parameters, in the model's order.
        lengths: tokens of each sample.
        config: everything about how gradients are held, and which budgets were stated.
        disk: bytes that the run may take.
        memory: bytes that one rank may take.
        row_dtype: in which rows are computed.
        device_memory: bytes that the run may take on its device; `None`: gradients are made in host memory.
        activations: bytes in host memory that a backward pass takes for each padded token.
        segments: parameters that share no wave with those of another segment, in this order; `None`: any may.
        apart: samples that share no batch, see `batches_of`.

    Raises:
        CapacityError: something does not fit; the message says what, by how much, and what would make it fit.
        ConfigError: rows are to be stored centered, and that takes more than one wave.
    """
    n_samples = len(lengths)
    row_itemsize = torch.finfo(row_dtype).bits // 8
    stored_itemsize = torch.finfo(config.dtype_store or row_dtype).bits // 8
    chosen = choose_representation(
        shapes, config.representation, row_itemsize=stored_itemsize, centered=config.store_centered
    )
    _, factors = sample_bytes(shapes, chosen, 1)
    batch_tokens = fit_batches(config, lengths, activations, factors, memory)
    sizes = WaveSizes(
        shapes,
        chosen,
        n_samples=n_samples,
        unit_rows=min(config.chunk_size, n_samples),
        batch_samples=max(samples_of_batches(lengths, config.chunk_size, batch_tokens, apart)),
        row_itemsize=row_itemsize,
        stored_itemsize=stored_itemsize,
    )
    names = [shape.name for shape in shapes]
    n_grams = len(gram_keys(names, config.gram_per))
    gram_bytes = 8 * n_samples**2 * n_grams
    limits = _wave_limits(
        shapes,
        n_samples,
        config,
        disk=disk,
        memory=memory,
        gram_bytes=gram_bytes,
        activations=activations * batch_tokens if config.memory_budget else 0.0,
    )
    if limits.disk <= 0:
        raise CapacityError(
            f"{n_grams} Grams of {n_samples} samples take {format_bytes(gram_bytes)} and {limits.disk_why} is "
            f"{format_bytes(disk)}. Take fewer samples, or keep fewer Grams with --gram-per layer."
        )
    keep = config.keep_gradients
    if keep is None:
        whole = sizes.of(names)
        keep = ("*",) if whole.disk <= limits.disk and whole.memory <= limits.memory else ()
    needs_disk = held_on_disk_for(config, keep, n_samples, memory)
    copy: str | None = None
    if keep and held_on_disk_for(config, (), n_samples, memory) is None:
        waves, copy = cut_and_copy(sizes, limits, keep, config, segments, device_memory)
        hold = "disk"
    else:
        waves, hold = cut_and_hold(sizes, limits, keep, config, segments, needs_disk, device_memory)
    if len(waves) > 1 and config.store_centered:
        raise ConfigError(
            f"store_centered=True takes one pass over all parameters, and within the budgets the run takes {len(waves)}"
            ". Leave it out (--center gives the covariance of uncentered gradients too), or give more disk and memory."
        )
    buffers = 1
    if hold == "disk" and copy is None and n_samples > config.chunk_size:
        waves, buffers = written_behind(sizes, limits, keep, segments, waves)
    cut = [list(wave.parameters) for wave in waves]
    return RunLayout(
        dict(chosen),
        waves,
        gram_keys(names, config.gram_per, cut),
        list(keep),
        batch_tokens,
        gram_bytes,
        hold,
        buffers,
        copy,
    )


def _wave_limits(
    shapes: Sequence[GradientShape],
    n_samples: int,
    config: SpectralConfig,
    *,
    disk: float,
    memory: float,
    gram_bytes: float,
    activations: float,
) -> WaveLimits:
    """Return what one wave may take.

    Args:
        shapes: of all parameters.
        n_samples: N.
        config: whether rows are stored centered, and which budgets were stated.
        disk: bytes that the run may take.
        memory: bytes that one rank may take.
        gram_bytes: of all Grams.
        activations: bytes of host memory that the largest batch takes beside its gradients.
    """
    means = 8 * sum(shape.columns for shape in shapes) * (len(make_units(n_samples, config.chunk_size)) + 1)
    return WaveLimits(
        disk=int(disk - gram_bytes - (means if config.store_centered else 0)),
        memory=int(memory - activations),
        disk_why=set_by(config.disk_budget, "--disk-budget", "what is free on the disk"),
        memory_why=set_by(config.memory_budget, "--memory-budget", "what is free"),
    )


def fit_batches(config: SpectralConfig, lengths: Sequence[int], activations: float, factors: float, memory: int) -> int:
    """Return how many padded tokens a backward pass may take: the config's, or fewer where the budget asks for it.

    Smaller batches come before more waves: down to `_LEAST_TOKENS` they cost little, and a wave costs a pass.
    """
    longest = max(lengths)
    if config.memory_budget is None or activations <= 0:
        return config.batch_tokens
    if activations * longest > ACTIVATION_SHARE * memory:
        needed = int(longest * activations / ACTIVATION_SHARE)
        raise CapacityError(
            f"one sample of {longest} tokens needs about {format_bytes(longest * activations)} for its activations and "
            f"--memory-budget {format_bytes(memory)} leaves {format_bytes(ACTIVATION_SHARE * memory)} for them. Give "
            f"at least {format_bytes(needed)}, or cut the samples with --max-length."
        )
    each = activations + FACTOR_COPIES * factors * len(lengths) / sum(lengths)
    fits = min(int(ACTIVATION_SHARE * memory / activations), max(int(_BATCH_SHARE * memory / each), _LEAST_TOKENS))
    return min(config.batch_tokens, max(fits, longest))


def samples_of_batches(
    lengths: Sequence[int], chunk_size: int, batch_tokens: int, apart: Sequence[int] | None = None
) -> list[int]:
    """Return the samples of each batch of a run."""
    units = make_units(len(lengths), chunk_size)
    return [len(batch) for unit in units for batch in batches_of(unit, lengths, batch_tokens, apart)]


def boundary_memory(memory: float, places: Iterable[str]) -> int:
    """Return the bytes of host memory that the boundaries of streamed layers may take.

    None where gradients go to the disk: there a run that was stopped goes on with the boundaries that it left.

    Args:
        memory: bytes of the host that the run may take.
        places: where the gradients of its waves are held.
    """
    return int(min(_BOUNDARY_MEMORY.get(place, 0.0) for place in places) * memory)


def boundary_room(limit: float) -> int:
    """Return the bytes that the boundaries of streamed layers may take of a disk of which a run may take so much."""
    return int(BOUNDARY_SHARE * limit)
