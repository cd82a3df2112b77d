"""Per-sample gradients of all samples into a run, over as many processes as Accelerate started.

A unit of samples is computed, written, and then marked; after a kill, only units without a marker are computed again.
Units are claimed by whichever rank is free, and what a unit gives depends neither on the rank nor on their number.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from streamfisher.collection.behaviour import check_behaviour
from streamfisher.collection.classes import stored_classes
from streamfisher.collection.prepare import beside_weights, make_manifest, prepare_either, probe, within_devices
from streamfisher.collection.producers import check_streamable, fixed_choice, make_producer
from streamfisher.collection.resume import create_or_resume, grown_to, stored_routes
from streamfisher.collection.survey import survey
from streamfisher.collection.waves import Collection
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import padded_total
from streamfisher.errors import CorruptRunError
from streamfisher.gradients.state import without_packing
from streamfisher.models.dtypes import in_dtype
from streamfisher.models.offload import input_device
from streamfisher.models.sharding import is_sharded, reshard
from streamfisher.models.weights import Resident
from streamfisher.planning.run_layout import boundary_memory, boundary_room
from streamfisher.runtime.caller_state import modes_of_its_own
from streamfisher.runtime.determinism import deterministic
from streamfisher.runtime.disk import disk_limit, free_disk
from streamfisher.runtime.memory import local_ranks, of_one_rank, sparing_old_objects, working_memory
from streamfisher.runtime.printable import printable
from streamfisher.runtime.ranks import Ranks, start_ranks
from streamfisher.runtime.run_log import RunLog, event
from streamfisher.runtime.signals import finishing_first
from streamfisher.runtime.threads import chunks_at_a_time
from streamfisher.store import RankLock, Role, RunStore, with_new_samples_as
from streamfisher.store.texts import write_texts


@modes_of_its_own()
def collect_gradients(
    model: nn.Module,
    samples: Any,
    path: Path,
    *,
    config: SpectralConfig | None = None,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    n_samples: int | None = None,
    description: str | Mapping[str, Any] | None = None,
    progress: bool = False,
    weights: Resident | None = None,
    role: Role = "train",
) -> None:
    """Collect a run into the folder `path`: what `streamfisher.collect` does, and says what it takes and raises."""
    stated = SpectralConfig.of(config)
    config = of_one_rank(stated)
    if config.stream == "layers":
        check_streamable(model, config)
    state = start_ranks(cpu=config.device == "cpu", timeout=config.rank_timeout)
    model = in_dtype(model, config.dtype_model)
    with (
        finishing_first() as stop,
        Ranks(state, timeout=config.rank_timeout, stop=stop) as ranks,
        deterministic(config.use_deterministic, config.seed),
        without_packing(model),  # from the first pass on
        sparing_old_objects(),
        chunks_at_a_time(len(os.sched_getaffinity(0)) // local_ranks()),
    ):
        begun = RunStore(path) if (path / "manifest.json").is_file() else None
        known = (None, None) if begun is None else (begun.manifest.layout.get("kept_apart"), stored_classes(begun))
        data = survey(model, samples, config, loss, n_samples, *known)
        config, stated = data.settled(config), data.settled(stated)
        reshard(model)
        sharded = is_sharded(model)
        config = within_devices(config, input_device(model), ranks, progress=progress)
        prepared = None
        streamed = fixed_choice(path, model, config, weights) if ranks.is_main else None
        if ranks.is_main and streamed is None:
            prepared = prepare_either(path, model, data, config, progress=progress)
            streamed = prepared.streamed
        streamed = bool(ranks.share("whether layers are streamed", streamed))
        chosen = make_producer(streamed, model, data, config, weights=weights, ranks=ranks)
        with chosen as producer, contextlib.ExitStack() as locks:
            manifest = make_manifest(model, producer, data, stated, description)
            manifest = with_new_samples_as(role, manifest, None if begun is None else begun.manifest)
            ranks.agree(manifest.facts() | {"folder": str(path.absolute())})
            layout = None
            if ranks.is_main:
                layout = create_or_resume(
                    path, manifest, model, producer, data, config, ranks, locks, progress, prepared, streamed
                )
            elif sharded and not ranks.share("whether the run exists"):
                probe(model, producer, config.memory_budget)
            ranks.wait("for the run's folder")
            if not ranks.is_main:
                locks.enter_context(RankLock(path))
            store = RunStore(path)
            store.fsync = config.fsync
            producer.apply_routes(stored_routes(store))
            check_behaviour(store, producer, data.batches(model, config, store.batch_tokens, store.units))
            ranks.wait("for the comparison with the run")  # nothing is changed before all ranks agree
            store = grown_to(len(data.samples), store, manifest, ranks, progress, layout)
            facts = {"samples": store.n_samples, "ranks": ranks.count, "waves": len(store.waves)}
            locks.enter_context(RunLog(path, "collect", ranks.index, device=str(state.device), **facts))
            if ranks.is_main:
                store.sweep()
                store.samples.write_fields(data.fields)
                if data.texts is not None:
                    write_texts(path, data.texts)
            batches = data.batches(model, config, store.batch_tokens, store.units)
            left = beside_weights(producer, config)
            collection = Collection(store, producer, batches, left, ranks, sharded, progress)
            if config.store_centered:
                collection.collect_mean()
            tokens = padded_total(data.lengths, store.units, store.batch_tokens, data.apart)
            memory = boundary_memory(working_memory(left.memory_budget), store.run.holds)
            room = boundary_room(min(disk_limit(config, path), free_disk(path)))
            producer.keep_between_waves(room, tokens, path / "stream", memory)
            collection.collect_waves()
            if ranks.is_main:
                _say_what_is_zero(store)


def _say_what_is_zero(store: RunStore) -> None:
    """Say, on the screen and in the run's log, of which parameters no sample has a gradient."""
    try:
        squares = store.samples.per_sample("squared_norm")[store.samples.per_sample("valid") == 1]
    except CorruptRunError:
        return  # whoever reads them is told
    zero = [name for name, column in zip(store.parameters, squares.T, strict=True) if not column.any()]
    if zero and len(squares):
        more = f" and of {len(zero) - 3} more parameters" if len(zero) > 3 else ""
        event("zero rows", parameters=zero)
        text = f"every row of {', '.join(zero[:3])}{more} is zero: no sample's loss depends on what it holds."
        tqdm.write(printable(text), file=sys.stderr)
