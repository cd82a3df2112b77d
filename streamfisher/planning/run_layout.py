"""What a run that is about to start will hold, and how it fits its budgets: representation, batches, waves, Grams."""

from __future__ import annotations

from collections.abc import Sequence
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
from streamfisher.planning.representation import choose_representation, sample_bytes
from streamfisher.planning.waves import FACTOR_COPIES, WaveLimits, WaveSize, WaveSizes, cut_waves
from streamfisher.reduction.tiles import needs_tiles
from streamfisher.runtime.disk import disk_limit
from streamfisher.runtime.memory import device_room, working_memory, world_size
from streamfisher.store.layout import PANEL

#: Of a memory budget, at most these shares are for the activations of a batch, and for them and its factors.
ACTIVATION_SHARE = 0.5
_BATCH_SHARE = 0.8
#: Of the disk, at most this share is for the boundaries of streamed layers.
BOUNDARY_SHARE = 0.25
#: Of the host's memory, at most these shares are for boundaries, by where gradients are held.
_BOUNDARY_MEMORY = {"device": 0.6, "host": 0.1}
#: Gradients held in memory take at most this share of it; the rest is for the pass and the reduction.
HOST_SHARE = 0.6
#: Gradients held on a device take at most this share of its room; the rest is for the pass and the reduction.
DEVICE_SHARE = 0.6
#: Waves more than on the disk that holding gradients in memory is worth.
HOST_WAVES = 3
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
            "unit_buffers": self.unit_buffers,
            "copy": self.copy,
        }

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
        waves, copy = _cut_and_copy(sizes, limits, keep, config, segments, device_memory)
        hold = "disk"
    else:
        waves, hold = _cut_and_hold(sizes, limits, keep, config, segments, needs_disk, device_memory)
    if len(waves) > 1 and config.store_centered:
        raise ConfigError(
            f"store_centered=True takes one pass over all parameters, and within the budgets the run takes {len(waves)}"
            ". Leave it out (--center gives the covariance of uncentered gradients too), or give more disk and memory."
        )
    buffers = 1
    if hold == "disk" and copy is None and n_samples > config.chunk_size:
        waves, buffers = _written_behind(sizes, limits, keep, segments, waves)
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


def _written_behind(
    sizes: WaveSizes,
    limits: WaveLimits,
    keep: Sequence[str],
    segments: Sequence[Sequence[str]] | None,
    waves: list[WaveSize],
) -> tuple[list[WaveSize], int]:
    """Return waves, and the units whose rows are in memory at a time: two where that takes no further wave.

    One is computed while the other is written.
    """
    twice = sizes.with_buffers(2)
    try:
        found = _cut(twice, limits, keep, segments)
    except CapacityError:
        return waves, 1
    return (found, 2) if len(found) <= len(waves) else (waves, 1)


def _cut(
    sizes: WaveSizes, limits: WaveLimits, keep: Sequence[str], segments: Sequence[Sequence[str]] | None
) -> list[WaveSize]:
    groups: Sequence[Sequence[str] | None] = [None] if segments is None else segments
    return [wave for names in groups for wave in cut_waves(sizes, limits, keep, names)]


def _cut_and_hold(
    sizes: WaveSizes,
    limits: WaveLimits,
    keep: Sequence[str],
    config: SpectralConfig,
    segments: Sequence[Sequence[str]] | None,
    needs_disk: str | None,
    device_memory: int | None,
) -> tuple[list[WaveSize], str]:
    """Return the waves, and where their gradients are until they are reduced: the nearest place that has room.

    Unless that takes clearly more waves than the next one does: each is another pass, and other places cost some.

    Raises:
        CapacityError: one parameter alone does not fit.
        ConfigError: gradients are to be held in memory, and what else was asked for needs the disk.
    """
    if config.hold in ("host", "device") and needs_disk is not None:
        raise ConfigError(f"hold={config.hold!r} holds gradients in memory, and {needs_disk}; leave out --hold.")
    places = {"disk": (sizes, limits)}
    if needs_disk is None:
        places = _places_in_memory(sizes, limits, config, device_memory) | places
    if config.hold != "auto":
        return _cut(*places[config.hold], keep, segments), config.hold
    best: tuple[list[WaveSize], str] | None = None
    problem: CapacityError | None = None
    for place, (of_place, within) in places.items():
        try:
            waves = _cut(of_place, within, keep, segments)
        except CapacityError as error:
            problem = error
            continue
        if best is None or len(best[0]) > HOST_WAVES + len(waves):
            best = (waves, place)
        if len(best[0]) <= HOST_WAVES:
            break
    if best is None:
        assert problem is not None  # the disk was tried
        raise problem
    return best


def _places_in_memory(
    sizes: WaveSizes, limits: WaveLimits, config: SpectralConfig, device_memory: int | None
) -> dict[str, tuple[WaveSizes, WaveLimits]]:
    """Return what waves take and may take on the device, if there is one, and in host memory; the nearest comes first.

    Raises:
        ConfigError: a device is asked for that there is not.
    """
    if config.hold == "device" and device_memory is None:
        raise ConfigError("hold='device': the model is not on a CUDA device; --hold host holds gradients in memory.")
    held, joined = _of_one_rank(sizes, config, world_size())
    places = {}
    if device_memory is not None:
        on_device = int(DEVICE_SHARE * (device_memory - 3 * 8 * sizes.n_samples**2))  # beside a sum of products
        why = _why(config.device_memory_budget, "--device-memory-budget", "what is free on the device")
        places["device"] = (held, WaveLimits(on_device - joined, limits.memory, why, place="on the device"))
    places["host"] = (held, limits_in_memory(limits.memory, limits.memory_why, joined))
    return places


def _cut_and_copy(
    sizes: WaveSizes,
    limits: WaveLimits,
    keep: Sequence[str],
    config: SpectralConfig,
    segments: Sequence[Sequence[str]] | None,
    device_memory: int | None,
) -> tuple[list[WaveSize], str | None]:
    """Return the waves of a run that keeps gradients, and where they are held too, so that no Gram waits for the disk.

    Where it was asked for; and on a device that has room without another wave, from which reading back is far.

    Raises:
        CapacityError: what was asked for does not fit.
        ConfigError: a device is asked for that there is not.
    """
    on_disk = _cut(sizes, limits, keep, segments)
    if config.hold == "disk" or (config.hold == "auto" and device_memory is None):
        return on_disk, None
    places = _places_in_memory(sizes, limits, config, device_memory)
    place = config.hold if config.hold != "auto" else "device"
    of_place, within = places[place]
    try:
        held = _cut(of_place, within, (), segments)
    except CapacityError:
        if config.hold != "auto":
            raise
        return on_disk, None
    if config.hold == "auto" and len(held) > len(on_disk):
        return on_disk, None
    return (held, place) if len(held) >= len(on_disk) else (on_disk, place)


def _of_one_rank(sizes: WaveSizes, config: SpectralConfig, count: int) -> tuple[WaveSizes, int]:
    """Return the sizes of what one of several ranks holds, and the bytes of one Gram's gradients of all samples.

    The latter pass beside what it holds: those that go to the others, those that come, and those that are multiplied.
    """
    if count == 1:
        return sizes.in_memory(), 0
    own = sum(map(len, make_units(sizes.n_samples, config.chunk_size)[::count]))
    whole = sizes.in_memory()
    of_grams = gram_keys(list(sizes.shapes), config.gram_per).values()
    return sizes.in_memory(own), 3 * max((whole.of(names).disk for names in of_grams), default=0)


def limits_in_memory(memory: int, why: str, joined: int = 0) -> WaveLimits:
    """Return what a wave may take whose gradients are held in memory.

    Args:
        memory: bytes for gradients, the pass and the reduction.
        why: what sets that limit, for messages.
        joined: bytes of what comes from other ranks for one Gram.
    """
    room = int(HOST_SHARE * memory)
    return WaveLimits(room - joined, memory - room, why, why, place="in memory")


def held_on_disk_for(config: SpectralConfig, keep: Sequence[str], n_samples: int, memory: int) -> str | None:
    """Return why gradients go to the disk whatever memory there is; `None`: nothing asks for it.

    Args:
        config: of the run.
        keep: glob patterns of parameters whose gradients stay.
        n_samples: N.
        memory: bytes that one rank may take.
    """
    if keep:
        return "some are to be kept"
    if config.store_centered or config.bitround is not None or config.dtype_store is not None:
        return "they are asked for as a store would hold them (store_centered, store_dtype, bitround)"
    if config.max_params_per_block is not None:
        return "Grams of drawn columns (max_params_per_block) are of stored rows"
    if _by_tiles(n_samples, memory):
        return f"Grams of {n_samples} samples, which are larger than the memory, are built by tiles of stored rows"
    return None


def _by_tiles(n_samples: int, memory: int) -> bool:
    try:
        return needs_tiles(n_samples, memory, PANEL)
    except CapacityError:  # the reduction says so
        return False


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
        disk_why=_why(config.disk_budget, "--disk-budget", "what is free on the disk"),
        memory_why=_why(config.memory_budget, "--memory-budget", "what is free"),
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


def boundary_memory(memory: float, hold: str) -> int:
    """Return the bytes of host memory that the boundaries of streamed layers may take, where gradients are held so.

    None where gradients go to the disk: there a run that was stopped goes on with the boundaries that it left.
    """
    return int(_BOUNDARY_MEMORY.get(hold, 0.0) * memory)


def boundary_room(limit: float) -> int:
    """Return the bytes that the boundaries of streamed layers may take of a disk of which a run may take so much."""
    return int(BOUNDARY_SHARE * limit)


def _why(value: Any, option: str, otherwise: str) -> str:
    return option if value is not None else otherwise
