"""Where the batch axis of a module's tensors is.

Four layouts are known: 'batch' `(B, ...)`; 'single' `(1, ...)`, shared by all samples and expanded so that its
gradient arrives per sample; 'flat' `(B*L, ...)`, sample-major; 'time' `(T, B, ...)`. A shape may fit several; which
one is right is never guessed: the probe compares gradients, and only layouts that it saw right are used afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

BATCH_FIRST = ("batch", "single", "flat", "time")
TIME_FIRST = ("time", "flat", "single", "batch")


def find_layout(shape: tuple[int, ...], n_samples: int, allowed: tuple[str, ...]) -> str | None:
    """Return the first layout of `allowed` that `shape` fits with `n_samples` samples, or None."""
    return next((layout for layout in allowed if _fits(layout, shape, n_samples)), None)


def is_ambiguous(shape: tuple[int, ...], n_samples: int, used: tuple[str, ...]) -> bool:
    """Return whether several of the layouts that one module was seen in fit `shape`, and mean different axes.

    A layer that is called batch-first and time-first gets the same shape from both where a batch has as many samples
    as its sequences have positions. 'batch' is 'flat' with one position each, and of one sample all layouts are alike.
    """
    if n_samples == 1:
        return False
    fitting = {layout for layout in used if _fits(layout, shape, n_samples)}
    if "batch" in fitting:
        fitting.discard("flat")
    return len(fitting) > 1


def _fits(layout: str, shape: tuple[int, ...], n_samples: int) -> bool:
    if not shape:
        return False
    if layout == "batch":
        return shape[0] == n_samples
    if layout == "single":
        return shape[0] == 1
    if layout == "time":
        return len(shape) > 1 and shape[1] == n_samples
    # A flat tensor has one length for all samples; a length of zero would hide an empty selection of tokens.
    return shape[0] > 0 and shape[0] % n_samples == 0


def as_batch(tensor: Tensor, layout: str, n_samples: int) -> Tensor:
    """Return `tensor` as `(B, ...)`, a view wherever possible."""
    if layout == "time":
        return tensor.transpose(0, 1)
    if layout == "flat":
        return tensor.reshape(n_samples, -1, *tensor.shape[1:])
    if layout == "single":
        return tensor.expand(n_samples, *tensor.shape[1:])
    return tensor


def position_counts(batch: Mapping[str, object], n_samples: int) -> dict[str, int]:
    """Return `{'input_ids:1': T, ...}`: the lengths that a batch explains.

    A flat layout `(B*L, ...)` is trusted when L is one of them. Otherwise L might be a number of tokens that a router
    happened to choose, which can differ from sample to sample.
    """
    counts = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == n_samples:
            product = 1
            for axis in range(1, value.dim()):
                product *= value.shape[axis]
                counts[f"{key}:{axis}"] = product
    return counts
