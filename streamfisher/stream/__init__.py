"""Streaming a model layer by layer: each layer's weights and gradients exist only while that layer is worked on."""

from streamfisher.stream.stream import LayerStream

__all__ = ["LayerStream"]
