"""Streaming a model layer by layer: each layer's weights and gradients exist only while that layer is worked on."""

from streamfisher.stream.layer_stream import LayerStream

__all__ = ["LayerStream"]
