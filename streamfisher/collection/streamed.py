"""A streamed run: each wave is a segment (or a part of one), and before its pass the stream is made ready."""

from __future__ import annotations

from typing import Any

from streamfisher.collection.batches import UnitBatches
from streamfisher.collection.survey import Survey
from streamfisher.data.batches import padded_total
from streamfisher.runtime.ranks import Ranks
from streamfisher.store import RunStore, stage_of
from streamfisher.stream.engine import StreamEngine


class StreamedRun:
    """The stream of a run, on one of its ranks.

    Boundaries are kept in the run's folder, so that ranks share them and a resumed run finds them.

    Args:
        engine: entered.
        store: of the run.
        found: its samples.
        ranks: all of them.
        room: bytes on the disk for boundaries; where all of them would take more, only every so-many-th layer's is
            kept.
    """

    def __init__(self, engine: StreamEngine, store: RunStore, found: Survey, ranks: Ranks, room: int) -> None:
        self.engine, self.store, self.ranks = engine, store, ranks
        self.folder = store.path / "stream"
        engine.keep_boundaries(self.folder, after_batch=ranks.alive)
        self.batches = UnitBatches(found, store.units, store.batch_tokens, engine.model)
        engine.thin_boundaries(room, padded_total(found.lengths, store.units, store.batch_tokens))

    def begin(self, wave: int) -> None:
        """Make ready for the pass of a wave; ranks divide what is missing."""
        todo = self.batches.only(self.store.todo(stage_of(wave)))
        names = self.store.waves[wave]
        if self.ranks.count > 1:
            self.engine.prepare(names, todo.share(self.ranks.index, self.ranks.count))
            self.ranks.wait("for the stream's boundaries")
        self.engine.begin_wave(names, todo)

    def finish(self, wave: int) -> None:
        """Forget what no later wave needs; all ranks are through this one."""
        waves: list[Any] = self.store.waves
        last = wave + 1 == len(waves) or not self.engine.same_segment(waves[wave], waves[wave + 1])
        if last and self.ranks.is_main:
            self.engine.finish_wave(waves[wave], self.batches)
        self.ranks.wait("for the end of the segment")

    def close(self) -> None:
        """Delete the boundaries; the run is complete."""
        if self.ranks.is_main:
            self.engine.stream.boundaries.clear()
