"""A run that leaves nothing behind: gradients are in memory, some parameters at a time, until their Grams are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psutil
from torch import nn

from streamfisher.analysis.facts import describe
from streamfisher.analysis.in_memory import grams_in_memory, spectrum_of_grams
from streamfisher.collection.guard import OwnGuard
from streamfisher.collection.passes import run_pass
from streamfisher.collection.prepare import make_manifest
from streamfisher.collection.producers import model_producer
from streamfisher.collection.survey import RunData, survey
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import make_units
from streamfisher.errors import CapacityError, NonFiniteError
from streamfisher.gradients.producer import GradientProducer, Wave
from streamfisher.models.dtypes import in_dtype
from streamfisher.planning.held_where import limits_in_memory
from streamfisher.planning.representation import choose_representation, sample_bytes
from streamfisher.planning.run_layout import fit_batches, samples_of_batches
from streamfisher.planning.waves import WaveSizes, cut_waves
from streamfisher.reduction.gram import ParameterGram
from streamfisher.results.spectrum import Spectrum
from streamfisher.runtime.caller_state import modes_of_its_own
from streamfisher.runtime.determinism import deterministic
from streamfisher.runtime.memory import working_memory
from streamfisher.sinks.memory import MemorySink

#: Of free memory, where no budget is stated.
_SHARE = 0.8


@modes_of_its_own()
def spectrum_in_memory(model: nn.Module, batch: Mapping[str, Any], n_samples: int, config: SpectralConfig) -> Spectrum:
    """Return the spectrum of a model on a batch; gradients that do not fit the memory at once take several passes.

    Args:
        model: on its device.
        batch: of samples.
        n_samples: how many to use, from the first.
        config: of the run; with storage_mode 'full', units are not cut.

    Raises:
        NonFiniteError: fewer than 2 samples have finite gradients.
        CapacityError: the gradients of one parameter do not fit the memory.
        StreamfisherError: whatever `collect` raises.
    """
    if config.storage_mode == "full":
        config = config.replace(chunk_size=n_samples)
    model = in_dtype(model, config.dtype_model)
    with deterministic(config.use_deterministic, config.seed):
        data = survey(model, batch, config, n_samples=n_samples)
        config = data.settled(config)
        with model_producer(model, data, config) as producer:
            manifest = make_manifest(model, producer, data, config, None, producer.probe())
            waves, factored, batch_tokens = _cut(producer, data, config)
            batches = data.batches(model, config, batch_tokens)
            parameters = {name: info.numel for name, info in producer.parameters.items()}
            built: dict[str, ParameterGram] = {}
            for index, names in enumerate(waves):
                wave = Wave(index, tuple(names), batches, tuple(batches))
                sink = _collected(producer, wave, data, config, [name for name in names if name in factored])
                source = sink.source()
                built |= {gram.name: gram for gram in grams_in_memory(source, parameters, config)}
                facts = describe(
                    manifest, config, n_stored=len(data.samples), n_targets=sink.n_targets, skipped=sink.skipped
                )
                del sink
        ordered = [built[name] for name in parameters]
        parts = batches.per_input
        return spectrum_of_grams(ordered, parameters, source.n_samples, source.numpy_row_dtype, config, facts, parts)


def _collected(
    producer: GradientProducer, wave: Wave, data: RunData, config: SpectralConfig, factored: Sequence[str]
) -> MemorySink:
    """Return the gradients of one wave."""
    units = make_units(len(data.samples), config.chunk_size)
    sink = MemorySink(producer, units, factored, parameters=wave.parameters)
    producer.begin(wave)
    run_pass(
        producer,
        sink,
        wave,
        sink.todo(),
        guard=OwnGuard(producer, wave.batches, sink.parameters, config.guard_every, config.seed),
        skip_nonfinite=config.on_nonfinite == "skip",
    )
    producer.finish(wave)
    n_valid = len(data.samples) - len(sink.skipped)
    if n_valid < 2:
        raise NonFiniteError(f"{n_valid} of {len(data.samples)} samples have finite gradients.")
    return sink


def _cut(
    producer: GradientProducer, data: RunData, config: SpectralConfig
) -> tuple[list[Sequence[str]], list[str], int]:
    """Return the parameters of each wave, those that are held as factors, and the padded tokens of a batch."""
    shapes, activations = producer.shapes()
    held_as = "dense" if config.max_params_per_block is not None else config.representation
    chosen = choose_representation(shapes, held_as, row_itemsize=producer.row_dtype.itemsize)
    stated, n = config.memory_budget is not None, len(data.samples)
    memory = working_memory(config.memory_budget) if stated else int(_SHARE * psutil.virtual_memory().available)
    batch_tokens = fit_batches(config, data.lengths, activations, sample_bytes(shapes, chosen, 1)[1], memory)
    sizes = WaveSizes(
        shapes,
        chosen,
        n_samples=n,
        unit_rows=0,
        batch_samples=max(samples_of_batches(data.lengths, config.chunk_size, batch_tokens, data.apart)),
        row_itemsize=producer.row_dtype.itemsize,
        stored_itemsize=producer.row_dtype.itemsize,
    )
    left = memory - 8 * n**2 * len(shapes) - (int(activations * batch_tokens) if stated else 0)
    try:
        waves = cut_waves(sizes, limits_in_memory(left, "memory_budget" if stated else "what is free"))
    except CapacityError as error:
        raise CapacityError(f"{error} storage_mode='streaming' holds gradients on disk instead.") from error
    return (
        [wave.parameters for wave in waves],
        [name for name, held in chosen.items() if held == "factors"],
        batch_tokens,
    )
