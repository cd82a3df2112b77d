"""A run on disk: a Zarr v3 hierarchy of gradient rows and Grams, with a manifest and durable markers beside it."""

from streamfisher.models.fingerprint import model_fingerprint, model_manifest
from streamfisher.store.eigenvectors import open_eigenvectors
from streamfisher.store.grams import GramStore
from streamfisher.store.growth import grow_run, grows_anew, resume_differences, units_left
from streamfisher.store.kept import KeptGradients
from streamfisher.store.layout import PANEL, chunk_columns
from streamfisher.store.lock import RankLock, RunLock
from streamfisher.store.manifest import Manifest, Role, differences, with_new_samples_as
from streamfisher.store.markers import Markers, stage_of
from streamfisher.store.names import node_name
from streamfisher.store.rows import RowStore
from streamfisher.store.run_store import RunStore, UnitRecord
from streamfisher.store.samples import SampleStore
from streamfisher.store.staged import written
from streamfisher.version import versions

__all__ = [
    # A run and its parts
    "RunStore",
    "RowStore",
    "SampleStore",
    "GramStore",
    "KeptGradients",
    "Markers",
    "UnitRecord",
    "stage_of",
    "open_eigenvectors",
    # Names and sizes of arrays
    "node_name",
    "chunk_columns",
    "PANEL",
    # What it was made from
    "Manifest",
    "Role",
    "with_new_samples_as",
    "differences",
    "model_fingerprint",
    "model_manifest",
    "versions",
    # One writer, wherever the run is, and more samples
    "written",
    "RankLock",
    "RunLock",
    "grow_run",
    "grows_anew",
    "resume_differences",
    "units_left",
]
