"""`run_pass`: any producer into any sink, unit by unit, with what is not finite named or left out."""

import numpy as np
import pytest
import torch
from tiny_models import TinyCausal, sequences

from streamfisher import SpectralConfig
from streamfisher.collection import make_producer, model_producer, run_pass
from streamfisher.collection.survey import survey
from streamfisher.data import make_units
from streamfisher.errors import DataError, LossError, NonFiniteError
from streamfisher.gradients import Asked, BatchGradients, Wave
from streamfisher.gradients.norms import batch_norms
from streamfisher.sinks import MemorySink


class Counting:
    """Gives the number of each sample as its gradient of one parameter."""

    def __init__(self, wrong=None):
        self.wrong, self.seen = wrong or {}, []

    def gradients(self, batch, asked):
        self.seen.append((batch.start, batch.stop))
        rows = asked.rows["p"]
        rows[:] = torch.arange(batch.start, batch.stop, dtype=rows.dtype)[:, None]
        for sample, value in self.wrong.items():
            if sample in batch.samples:
                rows[sample - batch.start] = value
        losses = torch.arange(batch.start, batch.stop, dtype=torch.float64)
        return BatchGradients(losses, torch.ones(len(batch), dtype=torch.int64), {}, asked.rows)


class Recording:
    """Keeps what it is told."""

    parameters = ("p",)

    def __init__(self):
        self.buffer, self.units, self.dropped = torch.zeros(4, 2), {}, []

    def norms(self, gradients, n_samples):
        return batch_norms(gradients.rows, gradients.factors, n_samples)

    def asks(self, batch):
        return Asked({"p": self.buffer[batch.start - batch.unit.start : batch.stop - batch.unit.start]})

    def batch(self, batch, gradients, dropped=()):
        self.dropped += [batch.start + place for place in dropped]

    def unit(self, unit, facts):
        self.units[unit.index] = (self.buffer[: len(unit)].clone(), facts)
        return 17


class Silent:
    def step(self, batch, gradients):
        pass


@pytest.fixture
def wave():
    data = survey(TinyCausal(), sequences(10), SpectralConfig(chunk_size=4))
    batches = data.batches(TinyCausal(), SpectralConfig(chunk_size=4, batch_tokens=20))
    return Wave(0, ("p",), batches, tuple(batches))


def test_every_batch_of_every_unit_goes_from_the_producer_to_the_sink(wave):
    producer, sink, sizes = Counting(), Recording(), []
    units = make_units(10, 4)
    run_pass(producer, sink, wave, units, guard=Silent(), after_unit=lambda unit, facts, size: sizes.append(size))
    assert producer.seen == [(batch.start, batch.stop) for batch in wave.batches]
    assert sizes == [17, 17, 17]
    for unit in units:
        rows, facts = sink.units[unit.index]
        numbers = np.arange(unit.start, unit.stop)
        assert np.array_equal(rows[:, 0].numpy(), numbers)
        assert np.array_equal(facts.losses, numbers)
        assert np.array_equal(facts.squared_norms["p"], 2.0 * numbers**2)


def test_a_gradient_that_is_not_finite_stops_the_pass_and_is_named(wave):
    with pytest.raises(NonFiniteError, match=r"sample 5: the gradient of p is not finite"):
        run_pass(Counting({5: torch.nan}), Recording(), wave, make_units(10, 4), guard=Silent())


def test_or_it_is_skipped_and_counts_for_nothing(wave):
    sink = Recording()
    run_pass(Counting({5: torch.nan}), sink, wave, make_units(10, 4), guard=Silent(), skip_nonfinite=True)
    _, facts = sink.units[1]
    assert facts.skipped == {5: "the gradient of p is not finite"} and sink.dropped == [5]
    assert facts.squared_norms["p"][1] == 0.0 and facts.n_targets.tolist() == [1, 0, 1, 1]


def test_labels_that_the_model_does_not_know_are_traced_to_their_samples(wave):
    class Refusing(Counting):
        def gradients(self, batch, asked):
            if 6 in batch.samples:
                error = LossError("label 99 is out of range")
                error.samples = [6 - batch.start]
                raise error
            return super().gradients(batch, asked)

    with pytest.raises(DataError, match=r"sample 6: label 99 is out of range"):
        run_pass(Refusing(), Recording(), wave, make_units(10, 4), guard=Silent())


def test_batches_of_equal_contents_are_told_apart():
    same = [{"input_ids": torch.tensor([1, 2, 3])}] * 6
    config = SpectralConfig(chunk_size=2)
    data = survey(TinyCausal(), same, config)
    batches = data.batches(TinyCausal(), config)
    assert len(set(batches)) == 3 and [str(batch) for batch in batches][-1] == "00000004-00000006"


@pytest.mark.parametrize("device_like", [False, True])
def test_memory_holds_the_rows_that_the_engine_forms(device_like):
    """Written into place at once, or a unit at a time as from a device."""
    config = SpectralConfig(chunk_size=4, batch_tokens=20)
    model = TinyCausal()
    data = survey(model, sequences(10), config)
    with model_producer(model, data, config) as producer:
        producer.probe()
        batches = data.batches(model, config)
        wave = Wave(0, tuple(producer.parameters), batches, tuple(batches))
        sink = MemorySink(producer, make_units(10, 4))
        if device_like:
            sink.through_units()
        producer.begin(wave)
        run_pass(producer, sink, wave, sink.todo(), guard=Silent())
        source = sink.source()
        expected = producer.engine.allocate(10)
        for batch in batches:
            producer.engine.rows(batches[batch], {n: v[batch.start : batch.stop] for n, v in expected.items()})
    assert source.n_samples == 10
    for name, values in expected.items():
        assert np.array_equal(source.columns(name, 0, values.shape[1]), values.numpy()), name


def test_a_stream_refuses_what_it_was_not_prepared_for():
    from stream.stream_models import model_and_batches

    from streamfisher.errors import CaptureError
    from streamfisher.gradients import GradientProducer

    model, batches, _ = model_and_batches("Llama", 10, 10)
    config = SpectralConfig(chunk_size=4)
    data = survey(model, batches[0], config)
    producer: GradientProducer
    with make_producer(True, model, data, config) as producer:
        producer.probe()
        known = data.batches(model, config)
        first, *rest = known
        producer.begin(Wave(0, tuple(producer.segments()[0]), known, (first,)))
        with pytest.raises(CaptureError, match="was not prepared for it"):
            producer.gradients(rest[0], Asked({}))
