"""Per-sample gradients of every trainable parameter, exactly, at about the price of an ordinary backward pass."""

from streamfisher.gradients.engine import GradientEngine
from streamfisher.gradients.parameters import ParameterInfo, select_parameters
from streamfisher.gradients.probe_report import ParameterReport, ProbeReport
from streamfisher.gradients.producer import BatchGradients

__all__ = [
    "GradientEngine",
    "BatchGradients",
    "ProbeReport",
    "ParameterReport",
    "ParameterInfo",
    "select_parameters",
]
