"""Eigenvectors of a block's Fisher in parameter space, streamed: directions that can be added to the model.

With `G'` the rows that count (restricted, centered, weighted: `G' = sqrt(n/Z) D^(1/2) (G - 1 m^T)`), `F = G'^T G' / n`
and `K' = G' G'^T = U diag(n lambda) U^T`, the eigenvectors are the rows of

    V = diag(n lambda)^(-1/2) U^T G' = C^T G        (k, P), V V^T = I

where the coefficients C (N, k) absorb weights and centering. Two passes over the stored rows of the block, a slab of
columns at a time: float32 products leave an error of 2e-8 lambda_1 in K', which is more than 1e-6 of a small
eigenvalue, so the first pass only measures `V V^T` and `G V^T` in float64 and corrects C by Rayleigh-Ritz; the second
writes V.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.errors import ConfigError, CorruptRunError, RunError
from streamfisher.runtime.durable import read_json, write_json, write_marker
from streamfisher.runtime.own_files import remove_tree
from streamfisher.store import RunLock, RunStore, codecs
from streamfisher.store.eigenvectors import Eigenvectors, folder_name, open_eigenvectors
from streamfisher.store.forms import EIGENVECTORS, require_form
from streamfisher.store.integrity import chunk_digest
from streamfisher.store.names import node_name
from streamfisher.store.opening import open_array

_SLAB_BYTES = 64 << 20


def compute_eigenvectors(
    store: RunStore, grams: BlockGrams, block: str, top: int, *, overwrite: bool = False, progress: bool = False
) -> Eigenvectors:
    """Write the leading eigenvectors of a block into the run; what is there already is not computed again.

    Args:
        store: of the run.
        grams: blocks, samples, weights and centering.
        block: its key.
        top: k, how many.
        overwrite: replace eigenvectors of this block that were made with other samples, weights, or another k.
        progress: show a bar.

    Raises:
        ConfigError: there is no such block, or it has fewer than `top` eigenvalues above its noise floor.
        RunError: other eigenvectors are there, another process writes the run, or Grams are subsampled.
    """
    if block not in grams.blocks:
        raise ConfigError(f"there is no block {block!r}; the blocks are {', '.join(grams.blocks)}.")
    if grams.config.max_params_per_block is not None:
        raise RunError(f"{store.path}: Grams of drawn columns (max_params_per_block) have no eigenvectors of a block.")
    names = [name for key in grams.blocks[block] for name in store.gram_members[key]]
    folder = folder_name(block, grams.center)
    identity = _identity(store, grams, block, top)
    with RunLock(store.path):
        _prepare(store, folder, identity, overwrite)
        job = _Job(store, grams, folder, names)
        if not job.is_done("solved"):
            coefficients = leading_coefficients(grams, block, top)
            _refine(job, coefficients, progress)
        if not job.is_done("finished"):
            _write(job, progress)
    return open_eigenvectors(store.path, block, center=grams.center)


class _Job:
    """One block's eigenvectors on disk: its group, its markers, and its rows."""

    def __init__(self, store: RunStore, grams: BlockGrams, folder: str, names: Sequence[str]):
        self.store, self.grams, self.names = store, grams, names
        self.marks = store.path / "done" / "eigenvectors" / folder
        self.folder = store.path / "eigenvectors" / folder
        self.group = codecs.quiet_open(self.folder, mode="r+")

    def is_done(self, what: str) -> bool:
        return (self.marks / f"{what}.json").is_file()

    def mark(self, what: str, content: dict[str, Any]) -> None:
        write_marker(self.marks / f"{what}.json", {**content, "marker": what}, fsync=self.store.fsync)

    def marker(self, what: str) -> Any:
        return read_json(self.marks / f"{what}.json")

    def array(self, name: str) -> np.ndarray:
        return np.asarray(open_array(self.folder / name)[...])

    def put(self, name: str, values: np.ndarray, dimensions: Sequence[str]) -> None:
        array = self.group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            dimension_names=tuple(dimensions),
            overwrite=True,
            compressors=codecs.compressors("zstd", self.store.row_dtype),
        )
        array[...] = values


def slabs(store: RunStore, name: str, width: int | None = None) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (start, stop, rows (N, stop - start) float64) of a parameter, with a mean that was subtracted put back.

    Args:
        store: of the run.
        name: of the parameter.
        width: columns that are read together at no extra cost; `None` means those of a chunk.
    """
    columns, chunk = store.parameters[name], max(width or store.rows.chunk_columns(name), 1)
    if width is None:
        chunk = max(_SLAB_BYTES // (8 * store.n_samples) // chunk, 1) * chunk
    for start in range(0, columns, chunk):
        stop = min(start + chunk, columns)
        rows = store.rows.columns(name, start, stop).astype(np.float64)
        mean = store.means.mean(name, start, stop)
        yield start, stop, rows if mean is None else rows + mean


def _identity(store: RunStore, grams: BlockGrams, block: str, top: int) -> dict[str, Any]:
    """Return what decides the eigenvectors, as plain JSON values."""
    selection = grams.selection
    digest = hashlib.sha256(selection.samples.astype("<i8").tobytes())
    digest.update(b"" if selection.weights is None else selection.weights.astype("<f8").tobytes())
    names = [name for key in grams.blocks[block] for name in store.gram_members[key]]
    sums = [store.grams.checksums(key) for key in grams.blocks[block]]
    return {
        "block": block,
        "parameters": names,
        "top": top,
        "centered": grams.center,
        "normalized_by": selection.normalization,
        "samples_and_weights": digest.hexdigest()[:16],
        "gram_keys": list(grams.blocks[block]),
        "grams": sums,
    }


def _prepare(store: RunStore, folder: str, identity: dict[str, Any], overwrite: bool) -> None:
    """Make the group, or check that what is there was begun for the same eigenvectors."""
    group, marks = store.path / "eigenvectors" / folder, store.path / "done" / "eigenvectors" / folder
    if (marks / "identity.json").is_file():
        before = read_json(marks / "identity.json")
        require_form(before, EIGENVECTORS, marks / "identity.json")
        if before == identity:
            return
        differing = [key for key in identity if before.get(key) != identity[key]]
        if not overwrite:
            raise RunError(
                f"{group} holds eigenvectors that differ in {', '.join(differing)} "
                f"({json.dumps(before.get(differing[0]))[:60]} there, {json.dumps(identity[differing[0]])[:60]} now); "
                "--overwrite replaces them."
            )
    # Markers first: a kill in between must not leave markers of arrays that are gone.
    remove_tree(store.path, marks)
    remove_tree(store.path, group)
    marks.mkdir(parents=True)
    codecs.quiet_open(store.path, mode="r+").require_group("eigenvectors").create_group(folder, attributes=identity)
    write_json(marks / "identity.json", identity)


def leading_coefficients(grams: BlockGrams, block: str, top: int) -> np.ndarray:
    """Return C (N, k) with `V = C^T G` the leading eigenvectors, as exact as the stored Grams.

    Raises:
        ConfigError: fewer than `top` eigenvalues lie above the noise floor.
    """
    spectrum = grams.only(block).spectrum().blocks[block]
    rank = int(spectrum.above_floor.sum())
    if not 1 <= top <= rank:
        raise ConfigError(
            f"{top} eigenvectors of block {block} were asked for and {rank} of its {len(spectrum.eigenvalues)} "
            f"eigenvalues lie above the noise floor; ask for 1 to {rank}."
        )
    values, vectors = np.linalg.eigh(grams.gram(block))
    values, vectors = values[::-1][:top], vectors[:, ::-1][:, :top]
    return _coefficients(grams, vectors / np.sqrt(values))


def _coefficients(grams: BlockGrams, scaled: np.ndarray) -> np.ndarray:
    """Return C (N, k) with `C^T G = scaled^T G'`."""
    selection = grams.selection
    n = len(selection)
    weights = np.ones(n) if selection.weights is None else selection.weights
    inner = np.sqrt(weights * (n / selection.denominator))[:, None] * scaled
    if grams.center:
        inner = inner - np.outer(weights / weights.sum(), inner.sum(axis=0))
    whole = np.zeros((grams.n_stored, scaled.shape[1]))
    whole[selection.samples] = inner
    return whole


def _refine(job: _Job, coefficients: np.ndarray, progress: bool) -> None:
    """First pass: measure V V^T and G V^T exactly, correct C by Rayleigh-Ritz, and store C and the eigenvalues."""
    k = coefficients.shape[1]
    overlap, products = np.zeros((k, k)), np.zeros_like(coefficients)
    for name in tqdm(job.names, desc="eigenvectors, pass 1 of 2", unit="parameter", disable=not progress):
        for _, _, rows in slabs(job.store, name):
            V = coefficients.T @ rows
            overlap += V @ V.T
            products += rows @ V.T
    _require_numbers(job, overlap)
    selection, center = job.grams.selection, job.grams.center
    Y = products[selection.samples]
    weights = np.ones(len(selection)) if selection.weights is None else selection.weights
    if center:
        Y = Y - (weights @ Y) / weights.sum()
    Y = np.sqrt(weights / selection.denominator)[:, None] * Y  # F restricted to the span of V is Y^T Y
    inverse = np.linalg.inv(np.linalg.cholesky(overlap))
    values, vectors = np.linalg.eigh(inverse @ (Y.T @ Y) @ inverse.T)
    X = inverse.T @ vectors[:, ::-1]
    # Signs are arbitrary; fixed so that the largest coefficient of each vector is positive.
    refined = coefficients @ X
    signs = np.sign(refined[np.abs(refined).argmax(axis=0), np.arange(k)])
    projections = products @ X * signs
    projections[job.store.samples.per_sample("valid") != 1] = np.nan
    job.put("coefficients", refined * signs, ("sample", "eigenvector"))
    job.put("projections", projections, ("sample", "eigenvector"))
    job.put("eigenvalues", values[::-1].copy(), ("eigenvector",))
    error = float(np.abs(overlap - np.eye(k)).max())
    job.mark("solved", {"overlap_before": error, "coefficients": chunk_digest(job.folder / "coefficients")})


def _require_numbers(job: _Job, overlap: np.ndarray) -> None:
    if not np.isfinite(overlap).all():  # what is missing on the disk reads as NaN
        raise CorruptRunError(f"{job.store.path}: some of what eigenvectors are made of is missing or damaged.")


def _write(job: _Job, progress: bool) -> None:
    """Second pass: write V parameter by parameter, each with its marker, and say how orthonormal the whole is."""
    if job.marker("solved").get("coefficients") not in (None, chunk_digest(job.folder / "coefficients")):
        raise CorruptRunError(f"{job.folder} is not what was written; `streamfisher verify --repair` clears it.")
    coefficients = job.array("coefficients")
    k = coefficients.shape[1]
    dtype = codecs.stored_dtype(job.store.row_dtype)
    shapes = {item["name"]: item["shape"] for item in job.store.manifest.parameters}
    for name in tqdm(job.names, desc="eigenvectors, pass 2 of 2", unit="parameter", disable=not progress):
        node = f"parameter-{node_name(name)}"
        if job.is_done(node):
            continue
        columns = job.store.parameters[name]
        array = job.group.create_array(
            f"vectors/{node_name(name)}",
            shape=(k, columns),
            chunks=(k, max(1, min(columns, (8 << 20) // (k * dtype.itemsize)))),
            dtype=dtype,
            fill_value=float("nan"),
            compressors=codecs.compressors("zstd", job.store.row_dtype),
            dimension_names=("eigenvector", f"element of {name}"),
            attributes={"parameter": name, "parameter_shape": shapes[name]},
            config={"write_empty_chunks": True},
            overwrite=True,
        )
        overlap = np.zeros((k, k))
        for start, stop, rows in slabs(job.store, name):
            V = (coefficients.T @ rows).astype(dtype)
            array[:, start:stop] = V
            overlap += V.astype(np.float64) @ V.astype(np.float64).T
        _require_numbers(job, overlap)
        job.mark(node, {"overlap": overlap.tolist()})
    total = sum(np.array(job.marker(f"parameter-{node_name(name)}")["overlap"]) for name in job.names)
    error = float(np.abs(total - np.eye(k)).max())
    job.group.attrs["orthonormality_error"] = error
    job.mark("finished", {"orthonormality_error": error, "files": chunk_digest(job.folder)})
