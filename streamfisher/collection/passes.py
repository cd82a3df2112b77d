"""One pass over the data: gradients from a producer, batch by batch, into a sink, unit by unit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from streamfisher.collection.guard import Guard
from streamfisher.data.batches import Unit
from streamfisher.errors import DataError, LossError, NonFiniteError
from streamfisher.gradients.producer import GradientProducer, Wave
from streamfisher.sinks.interface import GradientSink, UnitFacts


def run_pass(
    producer: GradientProducer,
    sink: GradientSink,
    wave: Wave,
    units: Iterable[Unit],
    *,
    guard: Guard,
    skip_nonfinite: bool = False,
    after_batch: Callable[[], None] = lambda: None,
    after_unit: Callable[[Unit, UnitFacts, int], None] = lambda unit, facts, size: None,
) -> None:
    """Take the gradients of some units into a sink.

    Args:
        producer: at work on the wave.
        sink: of the wave.
        wave: its parameters and batches.
        units: taken one after the other, when the one before is done with.
        guard: looks at every batch.
        skip_nonfinite: leave out samples whose loss or gradient is not finite, instead of stopping.
        after_batch: called after each backward pass.
        after_unit: called with the unit, what is known of it, and the bytes that the sink holds of it.

    Raises:
        NonFiniteError: a loss or gradient is not finite and is not to be skipped; the message names the sample.
        DataError: the model does not know a token id or label; the message names the samples.
    """
    for unit in units:
        losses, targets = np.empty(len(unit)), np.empty(len(unit), dtype=np.int64)
        norms = {name: np.zeros(len(unit)) for name in sink.parameters}
        skipped: dict[int, str] = {}
        for batch in wave.batches.of(unit):
            where = slice(batch.start - unit.start, batch.stop - unit.start)
            asked = sink.asks(batch)
            with _naming_samples(batch.samples):
                gradients = producer.gradients(batch, asked)
            guard.step(batch, gradients)
            after_batch()
            losses[where], targets[where] = gradients.losses.numpy(), gradients.n_targets.numpy()
            for name, values in sink.norms(gradients, len(batch)).items():
                norms[name][where] = values
            bad = _nonfinite(batch.samples, losses[where], norms, where)
            if bad and not skip_nonfinite:
                sample, reason = next(iter(bad.items()))
                raise NonFiniteError(
                    f"sample {sample}: {reason}. Everything before it is kept. Remove the sample, use a wider --dtype, "
                    "or leave such samples out, counted and named, with --on-nonfinite skip."
                )
            skipped |= bad
            sink.batch(batch, gradients, dropped=[sample - batch.start for sample in bad])
            del gradients
        for sample in skipped:
            targets[sample - unit.start] = 0
            for values in norms.values():
                values[sample - unit.start] = 0.0
        facts = UnitFacts(losses, targets, norms, skipped)
        after_unit(unit, facts, sink.unit(unit, facts))


@contextlib.contextmanager
def _naming_samples(samples: range) -> Iterator[None]:
    """Say of a label or token id that the model does not know which samples of the data it may come from."""
    try:
        yield
    except (LossError, IndexError) as error:
        bad = [samples.start + offset for offset in getattr(error, "samples", [])]
        which = f"sample {bad[0]}" if bad else f"samples {samples.start} to {samples.stop - 1}"
        raise DataError(
            f"{which}: {str(error).rstrip('.')}. Token ids and labels must lie in the model's vocabulary."
        ) from error


def _nonfinite(samples: range, losses: np.ndarray, norms: Mapping[str, np.ndarray], where: slice) -> dict[int, str]:
    """Return `{sample number: what is not finite}` of a batch, `where` being its place in the unit's norms."""
    bad = {}
    for place, sample in enumerate(samples):
        if not np.isfinite(losses[place]):
            bad[sample] = f"the loss is {losses[place]}"
            continue
        name = next((name for name, values in norms.items() if not np.isfinite(values[where][place])), None)
        if name is not None:
            bad[sample] = f"the gradient of {name} is not finite"
    return bad
