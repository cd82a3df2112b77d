"""A run on disk: a Zarr v3 hierarchy of gradient rows and Grams, with a manifest and durable markers beside it."""

from streamfisher.store.lock import RunLock
from streamfisher.store.manifest import Manifest, differences, model_fingerprint, model_manifest, versions
from streamfisher.store.run_store import RunStore, UnitRecord

__all__ = [
    "Manifest",
    "RunLock",
    "RunStore",
    "UnitRecord",
    "differences",
    "model_fingerprint",
    "model_manifest",
    "versions",
]
