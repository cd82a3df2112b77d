"""Models: loaded, placed, called, and the per-sample losses of what they return."""

from streamfisher.models.batches import ModelBatches
from streamfisher.models.calling import batch_size, call_model, find_logits, sample_of
from streamfisher.models.device_map import check_device_map, read_device_map
from streamfisher.models.fingerprint import model_fingerprint, model_manifest
from streamfisher.models.loading import load_model, load_with_tokenizer
from streamfisher.models.losses import PerSampleLoss, resolve_loss
from streamfisher.models.model_labels import draw_labels, sample_seed
from streamfisher.models.offload import is_offloaded
from streamfisher.models.sharding import is_sharded, shard
from streamfisher.models.skeleton import build_skeleton, load_skeleton, skeleton_is_needed, skeleton_with_tokenizer
from streamfisher.models.tokenizers import check_bytes, load_tokenizer, own_tokenizer, vocabulary_size
from streamfisher.models.weights import Checkpoint, Resident

__all__ = [
    # Loaded, or to be read layer by layer
    "load_model",
    "load_with_tokenizer",
    "load_skeleton",
    "build_skeleton",
    "skeleton_with_tokenizer",
    "skeleton_is_needed",
    "Resident",
    "Checkpoint",
    # Whose text has a tokenizer
    "load_tokenizer",
    "own_tokenizer",
    "check_bytes",
    "vocabulary_size",
    # Placed
    "read_device_map",
    "check_device_map",
    "is_offloaded",
    "is_sharded",
    "shard",
    # Called, and what it is asked to predict
    "call_model",
    "batch_size",
    "find_logits",
    "sample_of",
    "resolve_loss",
    "PerSampleLoss",
    "draw_labels",
    "sample_seed",
    "ModelBatches",
    # Recognised
    "model_fingerprint",
    "model_manifest",
]
