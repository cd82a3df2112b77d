"""Per-sample gradients of every trainable parameter, exactly, at about the price of an ordinary backward pass."""

from streamfisher.gradients.engine import GradientEngine
from streamfisher.gradients.factors import FactorPair
from streamfisher.gradients.model_producer import ModelProducer
from streamfisher.gradients.parameters import ParameterInfo, select_parameters
from streamfisher.gradients.plain import PlainAutograd
from streamfisher.gradients.probe_report import ParameterReport, ProbeReport
from streamfisher.gradients.producer import Asked, BatchGradients, GradientProducer, Wave
from streamfisher.gradients.projection import Projection
from streamfisher.gradients.rules import RULES, Rule
from streamfisher.gradients.shapes import Factor, GradientShape
from streamfisher.gradients.tolerance import FLOOR, TOLERANCE

__all__ = [
    # One model, one batch
    "GradientEngine",
    "ParameterInfo",
    "select_parameters",
    # Where the gradients of a pass come from
    "GradientProducer",
    "Wave",
    "Asked",
    "BatchGradients",
    "ModelProducer",
    # How they are formed
    "Rule",
    "RULES",
    "GradientShape",
    "Factor",
    "FactorPair",
    "Projection",
    # Why they can be trusted
    "ProbeReport",
    "ParameterReport",
    "TOLERANCE",
    "FLOOR",
    "PlainAutograd",
]
