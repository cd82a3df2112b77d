"""A wave's gradients to its Grams, shared among the ranks, and then deleted where they are not to be kept."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from streamfisher.config import SpectralConfig
from streamfisher.reduction import gram as grams
from streamfisher.reduction.stored_grams import build_held_grams, build_stored_grams
from streamfisher.runtime.bars import Bar
from streamfisher.runtime.exchange import Parcel, exchange
from streamfisher.runtime.memory import local_ranks
from streamfisher.runtime.ranks import Ranks
from streamfisher.sinks.memory import MemorySink
from streamfisher.store import RunStore, UnitRecord


def is_reduced(store: RunStore, wave: int, config: SpectralConfig) -> bool:
    """Return whether all Grams of a wave are there, for all samples and as `config` asks for them."""
    done = store.grams.done(grams.gram_settings(config))
    return done.issuperset(store.grams.keys_of(store.waves[wave]))


def reopen_wave(store: RunStore, wave: int, config: SpectralConfig) -> None:
    """Let a wave be collected again whose gradients were deleted and whose Grams are damaged or of another kind.

    Where only markers of some units are lost, those units are, and the Grams stay.
    """
    if any(store.kept.is_deleted(name) for name in store.waves[wave]):
        if not is_reduced(store, wave, config):
            for unit in store.units:
                store.forget_unit(unit, wave)
        store.kept.want(wave)


def reduce_wave(store: RunStore, wave: int, config: SpectralConfig, ranks: Ranks, *, progress: bool) -> None:
    """Build the missing Grams of a wave, every rank those it claims, and delete the wave's gradients.

    Args:
        store: of a run whose lock is held; the wave is fully collected.
        wave: its number.
        config: precision, workers and memory budget; what one host has is shared among its ranks.
        ranks: all of them.
        progress: show bars.

    Raises:
        CorruptRunError: stored gradients are missing or do not have the norms they were collected with.
        CapacityError: not even one panel fits the memory budget.
    """
    done = store.grams.done(grams.gram_settings(config))
    todo = ranks.share(
        f"the Grams of wave {wave}", [k for k in store.grams.keys_of(store.waves[wave]) if k not in done]
    )
    own = _share_of_host(config)
    if progress and ranks.is_main and todo and len(store.waves) > 1:
        tqdm.write(f"Grams of wave {wave + 1} of {len(store.waves)}")
    for keys in _claimed(todo, wave, own, ranks):
        build_stored_grams(store, own, keys, progress=progress and ranks.is_main)
        ranks.alive()
    ranks.wait("for the other ranks' Grams")
    if ranks.is_main:
        store.kept.delete(wave)
    ranks.wait("for the end of the wave")


def forget_wave(store: RunStore, wave: int) -> None:
    """Let a wave be collected again that is held in memory, where nothing of it is left."""
    for unit in store.units:
        store.forget_unit(unit, wave)
    store.kept.want(wave)


def reduce_held(
    store: RunStore, wave: int, sink: MemorySink, config: SpectralConfig, ranks: Ranks, *, progress: bool
) -> None:
    """Build the missing Grams of a wave where its gradients are, and then mark its units: the gradients are gone.

    Raises:
        CorruptRunError: a gradient is not finite.
        CapacityError: the reduction does not fit the memory budget.
        RankError: another rank failed.
    """
    built = build_held(store, wave, sink, config, ranks, progress=progress)
    norms = {}
    if not sink.every_norm:
        for name in store.waves[wave]:
            norms[name] = built[name] if name in built else store.grams.read(name)[0].diagonal()
    if ranks.is_main:
        store.kept.delete(wave)  # before any unit counts as done
    ranks.wait("for the end of the reduction")
    with store.marking_together():
        for unit in sink.own:
            facts = sink.facts[unit.index]
            squared = {name: values[unit.start : unit.stop].copy() for name, values in norms.items()}
            record = UnitRecord(
                unit,
                {},
                facts.losses,
                facts.n_targets,
                squared or facts.squared_norms,
                facts.skipped,
                wave=wave,
            )
            store.write_unit(record)
    ranks.wait("for the end of the wave")


def build_held(
    store: RunStore, wave: int, sink: MemorySink, config: SpectralConfig, ranks: Ranks, *, progress: bool
) -> dict[str, np.ndarray]:
    """Build the missing Grams of a wave where its gradients are.

    Several ranks have the gradients of their own samples. Each of them gets a Gram's gradients of all samples from the
    others, one Gram after the other, and forms it as one rank would: the same bits however many there are.

    Returns:
        Gram key -> its diagonal, (N,) float64, of those that were missing.

    Raises:
        CorruptRunError: a gradient is not finite.
        CapacityError: the reduction does not fit the memory budget.
        RankError: another rank failed.
    """
    own = _share_of_host(config)
    done = store.grams.done(grams.gram_settings(config))
    wanted = store.grams.keys_of(store.waves[wave])
    keys = ranks.share(f"the Grams of wave {wave}", [key for key in wanted if key not in done])
    skipped = {int(number) for part in ranks.gather("skipped samples", sorted(sink.skipped)) for number in part}
    valid = np.array([number not in skipped for number in range(store.n_samples)])
    if ranks.count == 1:
        return build_held_grams(store, sink.held(), valid, own, keys, progress=progress)
    return _built_by_ranks(store, sink, valid, own, keys, ranks, progress=progress)


def _built_by_ranks(
    store: RunStore,
    sink: MemorySink,
    valid: np.ndarray,
    config: SpectralConfig,
    keys: Sequence[str],
    ranks: Ranks,
    *,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Build Grams in turns, each rank one: the largest first, so that those of one turn are of about the same size.

    Returns:
        Gram key -> its diagonal, (N,) float64, on every rank.
    """
    members = {key: list(store.gram_members[key]) for key in keys}
    sizes = {key: sum(store.parameters[name] for name in names) for key, names in members.items()}
    order = sorted(keys, key=lambda key: -sizes[key])
    turns = [order[start : start + ranks.count] for start in range(0, len(order), ranks.count)]
    diagonals: dict[str, np.ndarray] = {}
    for turn in Bar(turns, desc="Grams", unit="turn", disable=not (progress and ranks.is_main)):
        wanted = [members[key] for key in turn] + [[]] * (ranks.count - len(turn))
        parcels = [sink.part(names) for names in wanted]
        arrived = exchange(ranks, parcels, sink.home, f"the gradients of {', '.join(turn[:3])}")
        del parcels
        mine: dict[str, np.ndarray] = {}
        if ranks.index < len(turn):
            source = sink.joined(arrived, wanted[ranks.index])
            mine = build_held_grams(store, source, valid, config, [turn[ranks.index]])
            del source
        del arrived
        ranks.alive()
        told = Parcel({key: torch.from_numpy(diagonal) for key, diagonal in mine.items()})
        for parcel in exchange(ranks, [told] * ranks.count, torch.device("cpu"), "the norms of gradients"):
            diagonals |= {key: tensor.numpy() for key, tensor in parcel.tensors.items()}
    return diagonals


def _claimed(todo: list[str], wave: int, config: SpectralConfig, ranks: Ranks):
    """Yield groups of keys for this rank: all for a single one, else enough to keep its workers busy."""
    if ranks.count == 1:
        if todo:
            yield todo
        return
    size = 2 * (config.n_workers or 1)
    groups = [todo[start : start + size] for start in range(0, len(todo), size)]
    while True:
        ranks.check()
        position = ranks.add(f"grams/{wave}/claimed", 1) - 1
        if position >= len(groups):
            return
        yield groups[position]


def _share_of_host(config: SpectralConfig) -> SpectralConfig:
    """Return the config with this rank's share of the cores of its host; its share of the memory it has already."""
    if local_ranks() == 1:
        return config
    return config.replace(n_workers=config.n_workers or max(1, len(os.sched_getaffinity(0)) // local_ranks()))
