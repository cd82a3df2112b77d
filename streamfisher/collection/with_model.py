"""A stored run together with the model and data that it was made with, whose gradients can then be formed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.analysis.run import StoredRun
from streamfisher.byte_sizes import parse_bytes
from streamfisher.collection.classes import stored_classes
from streamfisher.collection.prepare import make_manifest
from streamfisher.collection.producers import model_producer
from streamfisher.collection.resume import stored_routes
from streamfisher.collection.survey import survey
from streamfisher.config import parse_dtype
from streamfisher.errors import RunMismatchError
from streamfisher.gradients import GradientEngine
from streamfisher.gradients.state import without_packing
from streamfisher.models.batches import ModelBatches
from streamfisher.models.dtypes import in_dtype
from streamfisher.runtime.caller_state import modes_of_its_own
from streamfisher.runtime.determinism import deterministic
from streamfisher.store import resume_differences


def rounding_of(run: StoredRun) -> float:
    """Return what the arithmetic of a run's model may put on a gradient that is formed again, over its norm."""
    return 8 * max(torch.finfo(parse_dtype(item["dtype"])).eps for item in run.manifest.parameters)


def tolerance_of(run: StoredRun) -> float:
    """Return how far a gradient that is formed again may be from a stored one, over its norm."""
    return run.store.rows.norm_tolerance + rounding_of(run)


@contextmanager
def with_model(
    run: StoredRun,
    model: nn.Module,
    samples: Any,
    loss: Callable[..., Tensor] | None,
    *,
    what: str,
    memory_budget: int | str | None = None,
) -> Iterator[tuple[GradientEngine, ModelBatches]]:
    """Give the engine that forms the run's gradients by the rules of its probe, and the batches that it had.

    Args:
        run: open.
        model: the one that it was made with, on its device.
        samples: those that it was made with.
        loss: the one that `collect` was given.
        what: is done with them, for messages: 'verified'.
        memory_budget: bytes that a probe may take; `None`: the run's.

    Raises:
        RunMismatchError: model, data or loss are not those of the run; the message says which.
    """
    config, data = run.config, run.manifest.data
    budget = memory_budget if memory_budget is not None else config.memory_budget
    model = in_dtype(model, config.dtype_model)
    with (
        modes_of_its_own(),
        deterministic(config.use_deterministic, config.seed),
        without_packing(model),
    ):
        kept_apart = run.manifest.layout.get("kept_apart")
        given = data.get("n_sequences", data.get("n_inputs", data["n_samples"]))
        now = survey(model, samples, config, loss, given, kept_apart, stored_classes(run.store))
        with model_producer(model, now, config) as producer:
            manifest = make_manifest(model, producer, now, config, None)
            differences = resume_differences(run.manifest, manifest, now.samples.digest)
            if differences:
                raise RunMismatchError(
                    f"{run.path} cannot be {what} with these, because it was made otherwise:\n  - "
                    + "\n  - ".join(differences)
                    + "\nUse the same model, data and settings."
                )
            if config.stream == "none":
                producer.apply_routes(stored_routes(run.store))
            else:  # its routes are those of segments, and here the model is whole
                producer.probe(None if budget is None else parse_bytes(budget))
            yield producer.engine, now.batches(model, config, run.store.batch_tokens, run.store.units)
