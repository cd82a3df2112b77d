"""Eigenvectors in parameter space of a run that kept no gradients: one more pass with the model.

`V = C^T G` is added up batch by batch in float64, C (N, k) from the stored Grams. As these carry the rounding of their
products, V is not quite orthonormal; its own `V V^T` is exact, so Rayleigh-Ritz in its span, with the Gram for F, turns
it by a (k, k) matrix into vectors that are orthonormal, and as much the Fisher's as its Grams can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.eigenvector_job import EigenvectorJob, finish, keep_solution, write_vectors
from streamfisher.analysis.eigenvectors import leading_coefficients
from streamfisher.analysis.run import StoredRun
from streamfisher.collection.with_model import tolerance_of, with_model
from streamfisher.errors import RunError, RunMismatchError
from streamfisher.gradients import GradientEngine
from streamfisher.models.batches import ModelBatches
from streamfisher.runtime.bars import Bar
from streamfisher.runtime.memory import working_memory
from streamfisher.runtime.own_files import remove_tree
from streamfisher.store.eigenvectors import Eigenvectors, open_eigenvectors
from streamfisher.store.integrity import chunk_digest
from streamfisher.store.names import node_name

#: Where V is before it is turned, below the folder of the eigenvectors.
_UNTURNED = "unturned"
#: Of the memory, so much is for the vectors that are added up in one pass.
_SHARE = 0.5


def eigenvectors_by_pass(
    run: StoredRun,
    grams: BlockGrams,
    block: str,
    top: int,
    model: nn.Module,
    samples: Any,
    *,
    loss: Callable[..., Tensor] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Eigenvectors:
    """Write the leading eigenvectors of a block into the run from gradients that are formed again.

    A stopped one goes on with the parameters that are missing. Memory: `8 k P` bytes for as many parameters as half of
    the budget takes, at least one, and the rows of a batch; what does not fit takes another pass.

    Args:
        run: with all Grams.
        grams: blocks, samples, weights and centering.
        block: its key.
        top: k, how many.
        model: the one that the run was made with, on its device.
        samples: those that it was made with.
        loss: the one that `collect` was given.
        overwrite: replace eigenvectors of this block that were made with other samples, weights, or another k.
        progress: show a bar.

    Raises:
        ConfigError: there is no such block, or it has fewer than `top` eigenvalues above its noise floor.
        RunError: rows were stored centered, other eigenvectors are there, or another process writes the run.
        RunMismatchError: model, data or loss are not those of the run, or give other gradients than its Grams are of.
    """
    store = run.store
    if store.centered:
        raise RunError(
            f"{store.path} was stored centered; its eigenvectors are made from kept gradients (--keep-gradients all)."
        )
    with EigenvectorJob.locked(store, grams, block, top, overwrite=overwrite, rows="formed again") as job:
        if job.is_done("finished"):
            return open_eigenvectors(store.path, block, center=grams.center)
        if not job.is_done("solved"):
            coefficients = _begun(job, grams, block, top)
            missing = [name for name in job.names if not job.is_done(_mark(name))]
            if missing:
                with with_model(run, model, samples, loss, what="continued") as (engine, batches):
                    for names in _groups(job, missing, batches, top):
                        _add_up(job, names, coefficients, engine, batches, progress)
            _solve(job, coefficients, tolerance_of(run))
        write_vectors(job, job.names, lambda name: _turned(job, name))
        remove_tree(store.path, job.folder / _UNTURNED)
        finish(job)
    return open_eigenvectors(store.path, block, center=grams.center)


def _mark(name: str) -> str:
    return f"{_UNTURNED}-{node_name(name)}"


def _begun(job: EigenvectorJob, grams: BlockGrams, block: str, top: int) -> np.ndarray:
    """Return C (N, k): that of the beginning, since other signs would not go with the vectors that are there."""
    if not job.is_done("begun"):
        job.put(f"{_UNTURNED}/coefficients", leading_coefficients(grams, block, top), ("sample", "vector"))
        job.mark("begun", {"coefficients": chunk_digest(job.folder / _UNTURNED / "coefficients")})
    job.require_written(f"{_UNTURNED}/coefficients", job.marker("begun").get("coefficients"))
    return job.array(f"{_UNTURNED}/coefficients")


def _groups(job: EigenvectorJob, missing: Sequence[str], batches: ModelBatches, top: int) -> Iterator[list[str]]:
    """Yield parameters whose vectors are added up in one pass."""
    largest = max(len(batch) for batch in batches)
    per_column = 8 * top + largest * (job.store.run.numpy_row_dtype.itemsize + 8)
    room = _SHARE * working_memory(job.grams.config.memory_budget)
    group: list[str] = []
    for name in missing:
        if group and per_column * sum(job.store.parameters[n] for n in [*group, name]) > room:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _add_up(
    job: EigenvectorJob,
    names: Sequence[str],
    coefficients: np.ndarray,
    engine: GradientEngine,
    batches: ModelBatches,
    progress: bool,
) -> None:
    """Take one pass and write `C^T G` of some parameters; samples that have no part in C are left out."""
    k, sizes = coefficients.shape[1], job.store.parameters
    weights = torch.from_numpy(coefficients)
    device = engine.allocate(1, names[:1])[names[0]].device
    vectors = {name: torch.zeros(k, sizes[name], dtype=torch.float64, device=device) for name in names}
    title = f"eigenvectors, pass over {len(names)} parameters"
    for unit in Bar(job.store.units, desc=title, unit="unit", disable=not progress):
        for batch in batches.of(unit):
            inside = weights[batch.start : batch.stop].to(device)
            counted = (inside != 0).any(dim=1)
            if not counted.any():
                continue
            rows = engine.allocate(len(batch), names)
            engine.rows(batches[batch], rows, [])
            for name in names:
                vectors[name].addmm_(inside[counted].T, rows.pop(name)[counted].double())
    for name, values in vectors.items():
        array = job.create(_UNTURNED, name, k, np.dtype("float64"))
        array[...] = values.cpu().numpy()
        overlap = (values @ values.T).cpu().numpy()
        written = chunk_digest(job.folder / _UNTURNED / node_name(name))
        job.mark(_mark(name), {"overlap": overlap.tolist(), "vectors": written})


def _solve(job: EigenvectorJob, coefficients: np.ndarray, tolerance: float) -> None:
    """Turn V by what its own products and the Grams say.

    Both are of the same gradients: V F V^T by the Grams is diag(lambda) where V V^T, by the gradients that were formed
    again, is the identity. How far it is not, with the weight that eigenvalues give it, is how far they differ.

    Raises:
        RunMismatchError: they differ by more than `tolerance` of the largest eigenvalue.
    """
    overlap = np.sum([job.marker(_mark(name))["overlap"] for name in job.names], axis=0)
    store = job.store
    whole = np.sum([store.grams.read(key)[0] for key in job.grams.blocks[job.block]], axis=0)
    valid = store.samples.per_sample("valid") == 1
    products = np.where(valid[:, None], whole @ coefficients, 0.0)  # G V^T
    restricted = job.restricted(products)
    values = restricted.diagonal()
    sizes = np.sqrt(np.maximum(values, 0.0))
    off = float(np.abs(np.outer(sizes, sizes) * overlap - np.diag(values)).max() / values.max())
    if not off <= tolerance:
        raise RunMismatchError(
            f"{store.path}: the gradients that are formed now are not those that its Grams are of (they differ by "
            f"{off:.1e} of the largest eigenvalue, and rounding by {tolerance:.0e} at most). Use the libraries, device "
            "and settings of the model that made the run; `streamfisher verify --deep` says where they differ."
        )
    keep_solution(job, coefficients, overlap, restricted, products, rotation=f"{_UNTURNED}/rotation")


def _turned(job: EigenvectorJob, name: str) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield X^T V of a parameter, some columns at a time.

    Raises:
        CorruptRunError: X or V is not what was written.
    """
    job.require_written(f"{_UNTURNED}/rotation", job.marker("solved").get("rotation"))
    job.require_written(f"{_UNTURNED}/{node_name(name)}", job.marker(_mark(name)).get("vectors"))
    rotation = job.array(f"{_UNTURNED}/rotation")
    array: Any = job.group[f"{_UNTURNED}/{node_name(name)}"]
    for start in range(0, array.shape[1], array.chunks[1]):
        stop = min(start + array.chunks[1], array.shape[1])
        yield start, stop, rotation.T @ np.asarray(array[:, start:stop])
