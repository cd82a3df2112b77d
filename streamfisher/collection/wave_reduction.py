"""A wave's gradients to its Grams, shared among the ranks, and then deleted where they are not to be kept."""

from __future__ import annotations

import os

import numpy as np
from tqdm import tqdm

from streamfisher.collection.shared_reduction import build_shared
from streamfisher.config import SpectralConfig
from streamfisher.reduction import gram as grams
from streamfisher.reduction.stored_grams import build_held_grams, build_stored_grams
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

    Several ranks have the gradients of their own samples and share the columns, see `shared_reduction`.

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
    return build_shared(store, sink, valid, own, keys, ranks, progress=progress)


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
