"""Streaming a model layer by layer: each layer's weights and gradients exist only while that layer is worked on."""

from streamfisher.stream.backward import grad_at
from streamfisher.stream.boundaries import Boundaries
from streamfisher.stream.layer_stream import LayerStream
from streamfisher.stream.producer import StreamProducer
from streamfisher.stream.replay import value_name

__all__ = [
    # A model, a layer at a time
    "LayerStream",
    "StreamProducer",
    # What is kept between layers, and under which names
    "Boundaries",
    "value_name",
    "grad_at",
]
