"""Zoo models, their batches, and the rows that a stream and the ordinary engine give."""

from __future__ import annotations

import torch
from gradients import model_zoo

from streamfisher.gradients import GradientEngine
from streamfisher.models import batch_size, resolve_loss
from streamfisher.stream import LayerStream

ENTRIES = {entry.name.split(" ")[0]: entry for entry in reversed(model_zoo.ZOO)}


def model_and_batches(name, n=7, cut=4):
    entry = ENTRIES[name]
    model, batch = model_zoo.build(entry).eval(), entry.batch(n)
    parts = [{key: value[:cut] for key, value in batch.items()}, {key: value[cut:] for key, value in batch.items()}]
    return model, dict(enumerate(parts)), resolve_loss(model, batch)


def ordinary_rows(model, batches, loss):
    """{(batch, parameter): rows} of the ordinary engine."""
    found = {}
    with GradientEngine(model, loss, deterministic=True) as engine:
        engine.probe(batches[0])
        for index, batch in batches.items():
            out = engine.allocate(batch_size(batch))
            engine.rows(batch, out)
            found |= {(index, name): rows for name, rows in out.items()}
    return found


def buffers(stream, segment, batch):
    """Rows of a segment's parameters, filled with NaN, so that what is not written shows."""
    n = batch_size(batch)
    return {
        name: torch.full((n, stream.selection.infos[name].numel), float("nan"), dtype=torch.float32)
        for name in segment.parameters
    }


def streamed_rows(model, batches, loss, **options):
    """The same of a stream."""
    found = {}
    with LayerStream(model, loss, deterministic=True, **options) as stream:
        stream.study(batches[0])
        stream.forward(batches)
        for segment in stream.segments:
            stream.begin(segment, batches)
            for index, batch in batches.items():
                out = buffers(stream, segment, batch)
                stream.gradients(segment, index, batches, out)
                found |= {(index, name): rows for name, rows in out.items()}
            stream.finish(segment, batches)
    return found


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for key, rows in one.items():
        assert torch.equal(rows, other[key]), key
