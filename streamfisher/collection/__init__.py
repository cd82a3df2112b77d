"""Collecting a run: who computes what, in which order, and where it stopped."""

from streamfisher.collection.claims import Claims, idle_batches, share_of
from streamfisher.collection.guard import Guard, OwnGuard, SharedGuard, guarded_steps
from streamfisher.collection.passes import run_pass
from streamfisher.collection.prepare import make_manifest
from streamfisher.collection.producers import make_producer, model_producer, runs_in_waves
from streamfisher.collection.survey import RunData
from streamfisher.collection.waves import Collection

__all__ = [
    # A pass, and all passes of a run
    "run_pass",
    "Collection",
    # What it starts from
    "RunData",
    "make_producer",
    "model_producer",
    "runs_in_waves",
    "make_manifest",
    # Who takes what
    "Claims",
    "share_of",
    "idle_batches",
    "Guard",
    "OwnGuard",
    "SharedGuard",
    "guarded_steps",
]
