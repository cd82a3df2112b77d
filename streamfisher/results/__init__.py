"""Frozen results: spectra, their metrics, and what is known of their errors."""

from streamfisher.results.analyses import Alignment, Comparison, Growth, Overlap, SpectralDensity
from streamfisher.results.bootstrap import BlockBootstrap, Bootstrap, Interval
from streamfisher.results.directions import BlockDirections, DirectionAnalysis
from streamfisher.results.influence import BlockInfluence, Influence
from streamfisher.results.metrics import (
    SCALAR_METRICS,
    PowerLaw,
    effective_rank,
    participation_ratio,
    power_law,
    stable_rank,
)
from streamfisher.results.noise import noise_floor
from streamfisher.results.samples import LeaveOneOut, SampleAnalysis
from streamfisher.results.spectrum import BlockSpectrum, Spectrum, write_spectra

__all__ = [
    # Spectra
    "Spectrum",
    "BlockSpectrum",
    "write_spectra",
    # What else a run answers
    "Bootstrap",
    "BlockBootstrap",
    "Interval",
    "Growth",
    "Alignment",
    "SpectralDensity",
    "Comparison",
    "Overlap",
    "SampleAnalysis",
    "LeaveOneOut",
    "Influence",
    "BlockInfluence",
    "DirectionAnalysis",
    "BlockDirections",
    # Metrics of eigenvalues
    "SCALAR_METRICS",
    "effective_rank",
    "stable_rank",
    "participation_ratio",
    "PowerLaw",
    "power_law",
    "noise_floor",
]
