"""The passes of a run: every rank claims units that are not done, takes their gradients, and marks them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from streamfisher.byte_sizes import format_bytes
from streamfisher.collection.claims import Claims, idle_batches, share_of
from streamfisher.collection.guard import Guard, OwnGuard, SharedGuard
from streamfisher.collection.passes import run_pass
from streamfisher.collection.progress import Progress
from streamfisher.collection.wave_reduction import (
    build_held,
    forget_wave,
    is_reduced,
    reduce_held,
    reduce_wave,
    reopen_wave,
)
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import BatchRef, Unit
from streamfisher.errors import CapacityError, first_line
from streamfisher.gradients.producer import GradientProducer, Wave
from streamfisher.models.batches import ModelBatches
from streamfisher.runtime.memory import give_back, working_memory
from streamfisher.runtime.ranks import Ranks
from streamfisher.runtime.staging import staging_of
from streamfisher.runtime.threads import write_threads
from streamfisher.sinks.centered import CenteredSink
from streamfisher.sinks.device import DeviceSink
from streamfisher.sinks.disk import DiskSink
from streamfisher.sinks.interface import GradientSink, UnitFacts
from streamfisher.sinks.keeping import KeepingSink
from streamfisher.sinks.mean import MeanSink
from streamfisher.sinks.memory import MemorySink
from streamfisher.store import RunStore, stage_of

#: Of free memory, factors that wait to be written take at most this share.
WAITING_SHARE = 1 / 16


@dataclass(frozen=True)
class Collection:
    """What the passes of one run share, on one of its ranks.

    Args:
        store: of the run.
        producer: entered, with the run's routes.
        batches: of all units.
        config: of the run, with what its memory budget leaves.
        ranks: all of them.
        sharded: weights are spread over the ranks, which therefore take every step together.
        progress: show bars.
    """

    store: RunStore
    producer: GradientProducer
    batches: ModelBatches
    config: SpectralConfig
    ranks: Ranks
    sharded: bool
    progress: bool

    def collect_waves(self) -> None:
        """Collect every wave; where its gradients are not all kept, reduce it before the next one begins."""
        store, ranks = self.store, self.ranks
        products = SpectralConfig.from_dict(store.manifest.config).gram_options(self.config)
        means = self._means() if store.centered else {}
        held = store.run.hold != "disk"
        for index, names in enumerate(store.waves):
            title = "gradients" if len(store.waves) == 1 else f"wave {index + 1} of {len(store.waves)}"
            passing = len(store.waves) > 1 or "*" not in store.keep
            todo = store.markers.todo(stage_of(index))
            whole = passing and is_reduced(store, index, products) and not todo
            if ranks.share(f"whether wave {index} is reduced", whole):
                if not held:
                    reduce_wave(store, index, products, ranks, progress=self.progress)  # what is left to be deleted
                continue
            if held:
                self._held(index, names, title, products)
                continue
            fresh = store.run.copy is not None and len(todo) == len(store.units)
            if ranks.share(f"whether wave {index} begins", fresh):
                self._kept_and_held(index, names, title, products)
                continue
            if ranks.is_main:
                reopen_wave(store, index, products)
            ranks.wait("for the wave")
            with self._disk(store, index) as disk:
                sink = CenteredSink(disk, means) if store.centered else disk
                wave = self._wave(index, names, sink)
                self.producer.begin(wave)
                self._pass(sink, wave, title, "for the other ranks' gradients")
            give_back()
            if passing:
                reduce_wave(store, index, products, ranks, progress=self.progress)
            self.producer.finish(wave)
        self.producer.close()

    def _held(self, index: int, names: list[str], title: str, products: SpectralConfig) -> None:
        """Take a wave whose gradients are held, on the host or on the device, until its Grams are written.

        Each rank holds those of its own units. A kill costs the wave.
        """
        store, ranks = self.store, self.ranks
        alone = all(store.gram_members[key] == [key] for key in store.grams.keys_of(names))
        sink = self._memory(store.run.holds[index], names, every_norm=not alone)
        wave = self._begin_held(index, names, sink)
        full: str | None = None
        try:
            self._pass(sink, wave, title, "for the other ranks' gradients", fixed=True)
            reduce_held(store, index, sink, products, ranks, progress=self.progress)
        except torch.cuda.OutOfMemoryError as error:
            full = first_line(error)
        if full is not None:  # the error is gone, and with it all that it held
            n_bytes = sink.n_bytes
            del sink, wave
            give_back()
            raise self._full(title, full, n_bytes)
        del sink
        give_back()
        self.producer.finish(wave)

    def _kept_and_held(self, index: int, names: list[str], title: str, products: SpectralConfig) -> None:
        """Take a wave of which nothing is there yet: its gradients are held until they are reduced, and written beside.

        After a kill, what was written is there, and the rest of the wave goes through the disk.
        """
        store, ranks = self.store, self.ranks
        held = self._memory(store.run.copy, names, every_norm=False)
        wave = self._begin_held(index, names, held)
        own = RunStore(store.path, looked_over=True)  # whose markers do not wait for those of Grams
        own.fsync = store.fsync
        full: str | None = None
        with self._disk(own, index) as disk:
            try:
                self._pass(KeepingSink(disk, held), wave, title, "for the other ranks' gradients", fixed=True)
                build_held(store, index, held, products, ranks, progress=self.progress)
            except torch.cuda.OutOfMemoryError as error:
                full = first_line(error)
            n_bytes = held.n_bytes
            del held
            disk.settle()
        if full is not None:
            del wave
            give_back()
            raise self._full(title, full, n_bytes)
        ranks.wait("for the other ranks' disks")
        if ranks.is_main:
            store.kept.delete(index)
        ranks.wait("for the end of the wave")
        give_back()
        self.producer.finish(wave)

    def _disk(self, store: RunStore, index: int) -> DiskSink:
        """Return what writes a wave's gradients behind the back of the pass."""
        return DiskSink(
            store,
            index,
            self.producer,
            threads=write_threads(),
            room=self._room(),
            direct_io=self.config.direct_io,
        )

    def _memory(self, place: str | None, names: list[str], *, every_norm: bool) -> MemorySink:
        """Return what holds a wave's gradients, on each rank those of its own units."""
        store, ranks = self.store, self.ranks
        factored = [name for name in names if store.rows.representation(name) == "factors"]
        kind = DeviceSink if place == "device" else MemorySink
        sink = kind(
            self.producer,
            store.units,
            factored,
            parameters=names,
            columns=store.parameters,
            every_norm=every_norm,
            own=share_of(store.units, ranks.index, ranks.count),
        )
        if self.sharded:  # rows of batches that are only gone along with must not stay
            sink.through_units()
        return sink

    def _begin_held(self, index: int, names: list[str], sink: MemorySink) -> Wave:
        """Begin a wave that is taken whole."""
        self.ranks.wait("for the wave")
        if self.ranks.is_main:
            forget_wave(self.store, index)
        self.ranks.wait("for the beginning of the wave")
        own = tuple(batch for unit in sink.own for batch in self.batches.of(unit))
        wave = dataclasses.replace(self._wave(index, names, sink), own=own)
        self.producer.begin(wave)
        return wave

    def _full(self, title: str, why: str, held: int) -> CapacityError:
        """Return the error of a device that is full, once what was held on it is gone."""
        device = self.producer.device
        return CapacityError(
            f"{title}: {device} ran out of memory: {why} {format_bytes(held)} of gradients were held there"
            f"{_free_on(device)}. What is finished is kept: free memory on the device and run the command again, which "
            "goes on with this wave. Else, as a run's layout does not change, start it in another folder with a "
            "smaller --device-memory-budget or --batch-tokens, or with --hold host."
        )

    def collect_mean(self) -> None:
        """Add up the rows of every unit in float64; the mean is their sum over the valid samples."""
        store, ranks = self.store, self.ranks
        if ranks.share("the mean", (store.path / "done" / "mean.json").is_file()):
            return
        sink = MeanSink(store, self.producer)
        wave = self._wave(0, list(store.parameters), sink)
        self.producer.begin(wave)
        self._pass(sink, wave, "mean", "for the other ranks' part of the mean")
        if ranks.is_main:
            store.means.finish()
        ranks.wait("for the mean")
        self.producer.finish(wave)

    def _means(self) -> dict[str, np.ndarray]:
        means = {name: self.store.means.mean(name, 0, columns) for name, columns in self.store.parameters.items()}
        return {name: mean for name, mean in means.items() if mean is not None}

    def _room(self) -> int:
        """Return the bytes of factors that may wait to be written: beside one batch, none of a budget is for them."""
        return 0 if self.config.memory_budget else int(WAITING_SHARE * working_memory(None))

    def _wave(self, index: int, names: list[str], sink: GradientSink) -> Wave:
        todo = tuple(batch for unit in sink.todo() for batch in self.batches.of(unit))
        return Wave(index, tuple(names), self.batches, todo)

    def _pass(self, sink: GradientSink, wave: Wave, title: str, waiting: str, *, fixed: bool = False) -> None:
        """Take the units that this rank claims, or its fixed share of them.

        With sharded weights, go along with the other ranks' batches too.
        """
        config, ranks = self.config, self.ranks
        claims = Claims(ranks, title, sink.todo(), self.store.units, together=self.sharded or fixed)
        guarded = (list(sink.parameters), config.guard_every, config.seed)
        guard: Guard = OwnGuard(self.producer, self.batches, *guarded)
        if self.sharded:
            guard = SharedGuard(self.producer, self.batches, claims.units, ranks, *guarded)
        todo = sum(len(unit) for unit in claims.units)
        staging = staging_of(self.store.path)
        with Progress(ranks, title, todo=todo, total=self.store.n_samples, shown=self.progress) as bar:

            def note(unit: Unit, facts: UnitFacts, size: int) -> None:
                bar.done(unit, int(facts.n_targets.sum()), size)
                if staging is not None:
                    staging.made(size)

            run_pass(
                self.producer,
                sink,
                wave,
                claims,
                guard=guard,
                skip_nonfinite=config.on_nonfinite == "skip",
                after_batch=ranks.alive,
                after_unit=note,
            )
            if self.sharded:
                self._idle(sink, claims.units, guard)
            sink.settle()
            ranks.wait(waiting)

    def _idle(self, sink: GradientSink, units: list[Unit], guard: Guard) -> None:
        """Go along with batches of other ranks, where this one has no more: with one whose rows are dropped."""
        count = idle_batches(units, self.batches, self.ranks.index, self.ranks.count)
        batch = BatchRef(0, 1, self.store.units[0], 0)
        for _ in range(count):
            guard.step(batch, self.producer.gradients(batch, sink.asks(batch)))


def _free_on(device: torch.device) -> str:
    """Return what is free on a device, for a message."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return f", and {format_bytes(free + unused)} of its {format_bytes(total)} are free now"
