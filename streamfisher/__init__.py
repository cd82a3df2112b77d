"""streamfisher: exact spectra of the empirical Fisher of very large models, streamed out of core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streamfisher.analysis.compare import compare
from streamfisher.api import Run, collect, open_run
from streamfisher.config import SpectralConfig
from streamfisher.data import load_samples
from streamfisher.errors import StreamfisherError
from streamfisher.fisher import FisherSpectral
from streamfisher.models import load_model, load_skeleton
from streamfisher.results import Alignment, BlockSpectrum, Bootstrap, Comparison, Growth, SpectralDensity, Spectrum
from streamfisher.version import __version__

if TYPE_CHECKING:
    from streamfisher.callbacks import CollectCallback
    from streamfisher.verification.verify import verify

__all__ = [
    # One call
    "FisherSpectral",
    "SpectralConfig",
    # What a run is made of
    "load_model",
    "load_skeleton",
    "load_samples",
    # Stored runs
    "collect",
    "open_run",
    "Run",
    "verify",
    "compare",
    "CollectCallback",
    # Results
    "Spectrum",
    "BlockSpectrum",
    "Bootstrap",
    "Growth",
    "Alignment",
    "SpectralDensity",
    "Comparison",
    # Errors
    "StreamfisherError",
    "__version__",
]

if not TYPE_CHECKING:
    #: Imported when first asked for: transformers takes seconds, and most programs verify nothing.
    _WHEN_ASKED_FOR = {
        "CollectCallback": "streamfisher.callbacks",
        "verify": "streamfisher.verification.verify",
    }

    def __getattr__(name: str) -> Any:
        if name not in _WHEN_ASKED_FOR:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_WHEN_ASKED_FOR[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
