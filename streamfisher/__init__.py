"""streamfisher: exact spectra of the empirical Fisher of very large models, streamed out of core."""

from streamfisher.api import Run, collect, open_run
from streamfisher.config import SpectralConfig
from streamfisher.errors import StreamfisherError
from streamfisher.fisher import FisherSpectral
from streamfisher.results.spectrum import BlockSpectrum, Spectrum
from streamfisher.version import __version__

__all__ = [
    # One call
    "FisherSpectral",
    "SpectralConfig",
    # Stored runs
    "collect",
    "open_run",
    "Run",
    # Results
    "Spectrum",
    "BlockSpectrum",
    # Errors
    "StreamfisherError",
    "__version__",
]
