"""streamfisher: exact spectra of the empirical Fisher of very large models, streamed out of core."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from streamfisher.version import __version__

if TYPE_CHECKING:
    from streamfisher.analysis.compare import compare
    from streamfisher.api import Run, collect, open_run
    from streamfisher.callbacks import CollectCallback
    from streamfisher.collector import Collector
    from streamfisher.config import SpectralConfig
    from streamfisher.data import load_samples, text_samples
    from streamfisher.errors import StreamfisherError
    from streamfisher.fisher import FisherSpectral
    from streamfisher.lightning_callback import LightningCallback
    from streamfisher.models import load_model, load_skeleton
    from streamfisher.results import Alignment, BlockSpectrum, Bootstrap, Comparison, Growth, SpectralDensity, Spectrum
    from streamfisher.verification.verify import verify

__all__ = [
    # One call
    "FisherSpectral",
    "SpectralConfig",
    # What a run is made of
    "load_model",
    "load_skeleton",
    "load_samples",
    "text_samples",
    # Stored runs
    "collect",
    "open_run",
    "Run",
    "verify",
    "compare",
    # Along training
    "Collector",
    "CollectCallback",
    "LightningCallback",
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
    #: Imported when first asked for: torch and Accelerate take seconds.
    _ROOMS = {
        "analysis.compare": ("compare",),
        "api": ("Run", "collect", "open_run"),
        "callbacks": ("CollectCallback",),
        "collector": ("Collector",),
        "config": ("SpectralConfig",),
        "data": ("load_samples", "text_samples"),
        "errors": ("StreamfisherError",),
        "fisher": ("FisherSpectral",),
        "lightning_callback": ("LightningCallback",),
        "models": ("load_model", "load_skeleton"),
        "results": (
            "Alignment",
            "BlockSpectrum",
            "Bootstrap",
            "Comparison",
            "Growth",
            "SpectralDensity",
            "Spectrum",
        ),
        "verification.verify": ("verify",),
    }
    _ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in _ROOM_OF:
            found = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
            globals()[name] = found
            return found
        if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:  # a room
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
