"""A run on disk: a Zarr v3 hierarchy of gradient rows and Grams, with a manifest and durable markers beside it."""

from streamfisher.models.fingerprint import model_fingerprint, model_manifest
from streamfisher.store.growth import grow_run, resume_differences, units_left
from streamfisher.store.lock import RankLock, RunLock
from streamfisher.store.manifest import Manifest, differences
from streamfisher.store.run_store import RunStore, UnitRecord, stage_of
from streamfisher.version import versions

__all__ = [
    "Manifest",
    "RankLock",
    "RunLock",
    "RunStore",
    "UnitRecord",
    "differences",
    "grow_run",
    "model_fingerprint",
    "model_manifest",
    "resume_differences",
    "stage_of",
    "units_left",
    "versions",
]
