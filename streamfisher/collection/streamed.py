"""A streamed run: each wave is a segment (or a part of one), and before its pass the stream is made ready."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError
from streamfisher.runtime.ranks import Ranks
from streamfisher.data.samples import collate, padded_total
from streamfisher.models.sharding import is_sharded
from streamfisher.store import RunStore, stage_of
from streamfisher.stream.engine import StreamEngine, UnitBatches
from streamfisher.collection.survey import PROBE_SAMPLES, Survey, to_model


def check_streamable(model: nn.Module, config: SpectralConfig) -> None:
    """Refuse settings that need the whole model at once.

    Raises:
        ConfigError: the message names the setting.
    """
    if config.store_centered:
        raise ConfigError(
            "store_centered=True takes a pass over all parameters at once, and stream='layers' has none. Leave it out: "
            "--center gives the covariance of uncentered gradients too."
        )
    if config.project is not None:
        raise ConfigError(
            f"project={config.project} and stream='layers' do not go together. Use --stream none, where waves keep "
            "within the budgets, or leave out --project: a stream deletes its exact gradients layer by layer."
        )
    if config.labels == "model":
        raise ConfigError(
            "labels='model' draws labels from the whole model's output before each batch, which stream='layers' does "
            "not have. Use --stream none, or labels of the data."
        )
    if is_sharded(model):
        raise ConfigError("stream='layers' and --fsdp both split the model; use one of them.")


def first_samples(found: Survey, model: nn.Module) -> dict[str, Tensor]:
    """Return the batch that the model is traced on: the first samples, the second of another length if there is one."""
    numbers = list(range(min(PROBE_SAMPLES, len(found.samples))))
    length = found.lengths[0]
    if len(numbers) > 1 and all(found.lengths[number] == length for number in numbers):
        numbers[1] = next((n for n, other in enumerate(found.lengths) if other != length), numbers[1])
    return to_model(collate([found.samples[number] for number in numbers]), model)


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
