"""Where a run's gradients are until they are reduced, and the waves that this place takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from streamfisher.blocks.gram_keys import gram_keys
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import make_units
from streamfisher.errors import CapacityError, ConfigError
from streamfisher.planning.waves import WaveLimits, WaveSize, WaveSizes, cut_waves
from streamfisher.reduction.tiles import needs_tiles
from streamfisher.runtime.memory import world_size
from streamfisher.store.layout import PANEL

#: Gradients held in memory take at most this share of it; the rest is for the pass and the reduction.
HOST_SHARE = 0.6
#: Gradients held on a device take at most this share of its room; the rest is for the pass and the reduction.
DEVICE_SHARE = 0.6
#: Passes more than a place that is farther away takes, that holding gradients nearer is worth; of streamed layers, each
#: wave is a pass over its layer only.
HOST_PASSES = 3


def written_behind(
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


def cut_and_hold(
    sizes: WaveSizes,
    limits: WaveLimits,
    keep: Sequence[str],
    config: SpectralConfig,
    segments: Sequence[Sequence[str]] | None,
    needs_disk: str | None,
    device_memory: int | None,
) -> tuple[list[WaveSize], str]:
    """Return the waves, and where their gradients are until they are reduced: the nearest place that has room.

    Unless that takes clearly more passes than the next one does: they cost time, and other places cost some too. Where
    a parameter alone is too large for the device, the waves of such parameters are held in host memory, the others not.

    Raises:
        CapacityError: one parameter alone does not fit.
        ConfigError: gradients are to be held in memory, and what else was asked for needs the disk.
    """
    if config.hold in ("host", "device") and needs_disk is not None:
        raise ConfigError(f"hold={config.hold!r} holds gradients in memory, and {needs_disk}; leave out --hold.")
    places = {"disk": (sizes, limits)}
    if needs_disk is None:
        places = _places_in_memory(sizes, limits, config, device_memory) | places
    if config.hold == "device":
        try:
            return _cut(*places["device"], keep, segments), "device"
        except CapacityError as error:
            raise CapacityError(
                f"{error} Without --hold device, parameters that are too large for it are held in host memory."
            ) from error
    if config.hold != "auto":
        return _cut(*places[config.hold], keep, segments), config.hold
    ways: list[tuple[str, Callable[[], list[WaveSize]]]]
    ways = [(place, partial(_cut, *where, keep, segments)) for place, where in places.items()]
    if "device" in places:
        ways.insert(1, ("device", partial(_cut_and_share, sizes, limits, config, segments, device_memory or 0)))
    worth = HOST_PASSES * (1 if segments is None else len(segments))
    best: tuple[list[WaveSize], str] | None = None
    problem: CapacityError | None = None
    for place, cut in ways:
        if best is not None and best[1] == place:
            continue  # all fit on the device
        try:
            waves = cut()
        except CapacityError as error:
            problem = error
            continue
        if best is None or len(best[0]) > worth + len(waves):
            best = (waves, place)
        if len(best[0]) <= worth:
            break
    if best is None:
        assert problem is not None  # the disk was tried
        raise problem
    return best


def _cut_and_share(
    sizes: WaveSizes,
    limits: WaveLimits,
    config: SpectralConfig,
    segments: Sequence[Sequence[str]] | None,
    device_memory: int,
) -> list[WaveSize]:
    """Return waves on the device, and others in host memory of those parameters that alone are too large for it.

    Raises:
        CapacityError: one does not fit there either, or most gradients would be there: then all may be.
    """
    every, held = list(sizes.shapes), _own(sizes, config)
    large = {
        name for name in every if not _fits_alone(name, held, _on_device(sizes, limits, config, device_memory, [name]))
    }
    near = _on_device(sizes, limits, config, device_memory, [name for name in every if name not in large])
    far = limits_in_memory(limits.memory, limits.memory_why, _joined(sizes, config, sorted(large)))
    waves: list[WaveSize] = []
    for names in [every] if segments is None else segments:
        on_host, on_device = ([name for name in names if (name in large) is there] for there in (True, False))
        waves += cut_waves(held, near, among=on_device) if on_device or not names else []
        waves += [replace(wave, hold="host") for wave in cut_waves(held, far, among=on_host)] if on_host else []
    if sum(wave.disk for wave in waves if wave.hold) > sum(wave.disk for wave in waves) / 2:
        raise CapacityError("most gradients are of parameters that alone are too large for the device.")
    return waves


def _fits_alone(name: str, sizes: WaveSizes, limits: WaveLimits) -> bool:
    try:
        cut_waves(sizes, limits, among=[name])
    except CapacityError:
        return False
    return True


def _places_in_memory(
    sizes: WaveSizes, limits: WaveLimits, config: SpectralConfig, device_memory: int | None
) -> dict[str, tuple[WaveSizes, WaveLimits]]:
    """Return what waves take and may take on the device, if there is one, and in host memory; the nearest comes first.

    Raises:
        ConfigError: a device is asked for that there is not.
    """
    if config.hold == "device" and device_memory is None:
        raise ConfigError("hold='device': the model is not on a CUDA device; --hold host holds gradients in memory.")
    names, held = list(sizes.shapes), _own(sizes, config)
    places = {}
    if device_memory is not None:
        places["device"] = (held, _on_device(sizes, limits, config, device_memory, names))
    places["host"] = (held, limits_in_memory(limits.memory, limits.memory_why, _joined(sizes, config, names)))
    return places


def _on_device(
    sizes: WaveSizes, limits: WaveLimits, config: SpectralConfig, device_memory: int, names: Sequence[str]
) -> WaveLimits:
    """Return what a wave may take on the device, where these parameters are held there."""
    room = int(DEVICE_SHARE * (device_memory - 3 * 8 * sizes.n_samples**2))  # beside a sum of products
    why = set_by(config.device_memory_budget, "--device-memory-budget", "what is free on the device")
    return WaveLimits(room - _joined(sizes, config, names), limits.memory, why, place="on the device")


def cut_and_copy(
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


def _own(sizes: WaveSizes, config: SpectralConfig) -> WaveSizes:
    """Return the sizes of what one rank holds: the gradients of its own units."""
    if world_size() == 1:
        return sizes.in_memory()
    return sizes.in_memory(sum(map(len, make_units(sizes.n_samples, config.chunk_size)[:: world_size()])))


def _joined(sizes: WaveSizes, config: SpectralConfig, names: Sequence[str]) -> int:
    """Return the bytes that pass beside what a rank holds, where the Grams of these parameters are shared.

    The largest Gram's gradients of all samples: those that go to the others, those that come, and those that are
    multiplied.
    """
    if world_size() == 1:
        return 0
    whole = sizes.in_memory()
    return 3 * max((whole.of(members).disk for members in gram_keys(list(names), config.gram_per).values()), default=0)


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


def set_by(value: Any, option: str, otherwise: str) -> str:
    """Return what sets a limit, for messages: the option, where it has a value."""
    return option if value is not None else otherwise
