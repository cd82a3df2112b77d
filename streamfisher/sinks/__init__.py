"""Where the gradients of a pass go: to disk, into memory, into a mean."""

from streamfisher.sinks.centered import CenteredSink
from streamfisher.sinks.disk import DiskSink
from streamfisher.sinks.interface import GradientSink, GradientSource, UnitFacts
from streamfisher.sinks.mean import MeanSink
from streamfisher.sinks.memory import MemorySink
from streamfisher.sinks.memory_source import MemoryRows
from streamfisher.sinks.unit_rows import UnitRows

__all__ = [
    # The seam
    "GradientSink",
    "GradientSource",
    "UnitFacts",
    # Sinks
    "DiskSink",
    "MemorySink",
    "MeanSink",
    "CenteredSink",
    # Rows in memory
    "MemoryRows",
    "UnitRows",
]
