"""Eigenvectors of one block on disk, while they are made: laid out, solved, written, marked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import zarr

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.blocks.structures import unknown_block
from streamfisher.errors import CorruptRunError, RunError
from streamfisher.runtime.durable import read_json, write_json, write_marker
from streamfisher.runtime.own_files import remove_tree
from streamfisher.store import RunLock, RunStore, codecs
from streamfisher.store.eigenvectors import folder_name, read_marker
from streamfisher.store.forms import EIGENVECTORS, require_form
from streamfisher.store.integrity import chunk_digest
from streamfisher.store.names import node_name
from streamfisher.store.opening import open_array


class EigenvectorJob:
    """One block's eigenvectors on disk: its group, its markers, and its rows."""

    @classmethod
    @contextmanager
    def locked(
        cls, store: RunStore, grams: BlockGrams, block: str, top: int, *, overwrite: bool, rows: str | None = None
    ) -> Iterator[EigenvectorJob]:
        """Give the job of a block, begun or gone on with, while nobody else writes the run.

        Args:
            store: of the run.
            grams: blocks, samples, weights and centering.
            block: its key.
            top: k, how many.
            overwrite: replace eigenvectors of this block that were made otherwise.
            rows: where they come from, if not from the run; unfinished eigenvectors of other rows are not gone on with.

        Raises:
            ConfigError: there is no such block.
            RunError: other eigenvectors are there, another process writes the run, or Grams are subsampled.
        """
        if block not in grams.blocks:
            raise unknown_block(block, grams.blocks)
        if grams.config.max_params_per_block is not None:
            raise RunError(
                f"{store.path}: Grams of drawn columns (max_params_per_block) have no eigenvectors of a block."
            )
        names = [name for key in grams.blocks[block] for name in store.gram_members[key]]
        folder = folder_name(block, grams.center)
        identity = _identity(store, grams, block, top)
        with RunLock(store.path):
            _prepare(store, folder, identity if rows is None else {**identity, "rows": rows}, overwrite)
            yield cls(store, grams, folder, names, block)

    def __init__(self, store: RunStore, grams: BlockGrams, folder: str, names: Sequence[str], block: str):
        self.store, self.grams, self.names, self.block = store, grams, names, block
        self.marks = store.path / "done" / "eigenvectors" / folder
        self.folder = store.path / "eigenvectors" / folder
        self.group = codecs.quiet_open(self.folder, mode="r+")

    def is_done(self, what: str) -> bool:
        """Return whether there is a marker of this name."""
        return (self.marks / f"{what}.json").is_file()

    def mark(self, what: str, content: dict[str, Any]) -> None:
        """Write a marker, durably."""
        write_marker(self.marks / f"{what}.json", {**content, "marker": what}, fsync=self.store.fsync)

    def marker(self, what: str) -> Any:
        """Return what a marker says.

        Raises:
            CorruptRunError: it is not there, damaged, or another one.
        """
        return read_marker(self.marks, what)

    def array(self, name: str) -> np.ndarray:
        """Return a small array of the group."""
        return np.asarray(open_array(self.folder / name)[...])

    def checked_coefficients(self) -> np.ndarray:
        """Return C (N, k) as it was solved.

        Raises:
            CorruptRunError: it is not what was written.
        """
        self.require_written("coefficients", self.marker("solved").get("coefficients"))
        return self.array("coefficients")

    def require_written(self, name: str, digest: int | None) -> None:
        """Refuse an array of the group whose chunks are not those that a marker names; one without names none.

        Raises:
            CorruptRunError: they are not.
        """
        if digest not in (None, chunk_digest(self.folder / name)):
            raise CorruptRunError(
                f"{self.folder / name} is not what was written; `streamfisher verify --repair` clears it."
            )

    def restricted(self, products: np.ndarray) -> np.ndarray:
        """Return V F V^T (k, k), the Fisher or covariance of what counts in the span of V.

        Args:
            products: G V^T (N, k), of uncentered rows.
        """
        selection = self.grams.selection
        Y = products[selection.samples]
        weights = np.ones(len(selection)) if selection.weights is None else selection.weights
        if self.grams.center:
            Y = Y - (weights @ Y) / weights.sum()
        Y = np.sqrt(weights / selection.denominator)[:, None] * Y
        return Y.T @ Y

    def put(self, name: str, values: np.ndarray, dimensions: Sequence[str]) -> None:
        """Write a small array into the group, instead of any that was there."""
        array = self.group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            dimension_names=tuple(dimensions),
            overwrite=True,
            compressors=codecs.compressors("zstd", self.store.row_dtype),
        )
        array[...] = values

    def create(self, group: str, name: str, k: int, dtype: np.dtype) -> zarr.Array:
        """Lay out vectors over a parameter, (k, P_k), instead of any that were there."""
        columns = self.store.parameters[name]
        return self.group.create_array(
            f"{group}/{node_name(name)}",
            shape=(k, columns),
            chunks=(k, max(1, min(columns, (8 << 20) // (k * dtype.itemsize)))),
            dtype=dtype,
            fill_value=float("nan"),
            compressors=codecs.compressors("zstd", self.store.row_dtype),
            dimension_names=("eigenvector", f"element of {name}"),
            attributes={"parameter": name, "parameter_shape": list(self.store.rows.shape(name))},
            config={"write_empty_chunks": True},
            overwrite=True,
        )


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
        finished = (marks / "finished.json").is_file()  # then it does not matter whence the rows came
        if before == identity or (finished and {**before, "rows": None} == {**identity, "rows": None}):
            return
        differing = [key for key in identity | before if before.get(key) != identity.get(key)]
        begun = [path for path in marks.glob("*.json") if path.name != "identity.json"]
        if begun and not overwrite:
            there, now = (json.dumps(facts.get(differing[0]))[:60] for facts in (before, identity))
            raise RunError(
                f"{group} holds eigenvectors that differ in {', '.join(differing)} ({there} there, {now} now); "
                "--overwrite replaces them."
            )
    # Markers first: a kill in between must not leave markers of arrays that are gone.
    remove_tree(store.path, marks)
    remove_tree(store.path, group)
    marks.mkdir(parents=True)
    codecs.quiet_open(store.path, mode="r+").require_group("eigenvectors").create_group(folder, attributes=identity)
    write_json(marks / "identity.json", identity)


def keep_solution(
    job: EigenvectorJob,
    coefficients: np.ndarray,
    overlap: np.ndarray,
    restricted: np.ndarray,
    products: np.ndarray,
    *,
    rotation: str | None = None,
) -> None:
    """Solve by Rayleigh-Ritz in the span of `V = C^T G`, and store coefficients, eigenvalues and projections.

    Args:
        job: of the block.
        coefficients: C (N, k).
        overlap: V V^T (k, k), exact.
        restricted: V F V^T (k, k).
        products: G V^T (N, k).
        rotation: where X (k, k) with `X^T V` the eigenvectors is stored; `None`: nowhere.
    """
    require_numbers(job, overlap)
    inverse = np.linalg.inv(np.linalg.cholesky(overlap))
    values, vectors = np.linalg.eigh(inverse @ restricted @ inverse.T)
    X = inverse.T @ vectors[:, ::-1]
    # Signs are arbitrary; fixed so that the largest coefficient of each vector is positive.
    refined = coefficients @ X
    signs = np.sign(refined[np.abs(refined).argmax(axis=0), np.arange(X.shape[1])])
    projections = products @ X * signs
    projections[job.store.samples.per_sample("valid") != 1] = np.nan
    job.put("coefficients", refined * signs, ("sample", "eigenvector"))
    if rotation is not None:
        job.put(rotation, X * signs, ("vector of C", "eigenvector"))
    job.put("projections", projections, ("sample", "eigenvector"))
    job.put("eigenvalues", values[::-1].copy(), ("eigenvector",))
    error = float(np.abs(overlap - np.eye(X.shape[1])).max())
    solved = {"overlap_before": error, "coefficients": chunk_digest(job.folder / "coefficients")}
    if rotation is not None:
        solved["rotation"] = chunk_digest(job.folder / rotation)
    job.mark("solved", solved)


def require_numbers(job: EigenvectorJob, overlap: np.ndarray) -> None:
    """Refuse vectors that are not finite.

    Raises:
        CorruptRunError: they are not.
    """
    if not np.isfinite(overlap).all():  # what is missing on the disk reads as NaN
        raise CorruptRunError(f"{job.store.path}: some of what eigenvectors are made of is missing or damaged.")


def write_vectors(
    job: EigenvectorJob,
    names: Iterable[str],
    vectors: Callable[[str], Iterator[tuple[int, int, np.ndarray]]],
) -> None:
    """Write V parameter by parameter, each with its marker.

    Args:
        job: of the block, solved.
        names: all its parameters.
        vectors: of a parameter: (start, stop, V (k, stop - start) float64), from its first column to its last.
    """
    k = len(job.array("eigenvalues"))
    for name in names:
        node = f"parameter-{node_name(name)}"
        if job.is_done(node):
            continue
        array = job.create("vectors", name, k, codecs.stored_dtype(job.store.row_dtype))
        overlap = np.zeros((k, k))
        for start, stop, exact in vectors(name):
            V = exact.astype(array.dtype)
            array[:, start:stop] = V
            overlap += V.astype(np.float64) @ V.astype(np.float64).T
        require_numbers(job, overlap)
        job.mark(node, {"overlap": overlap.tolist()})


def finish(job: EigenvectorJob) -> None:
    """Say how orthonormal the whole is, and mark it as finished."""
    k = len(job.array("eigenvalues"))
    total = sum(np.array(job.marker(f"parameter-{node_name(name)}")["overlap"]) for name in job.names)
    error = float(np.abs(total - np.eye(k)).max())
    job.group.attrs["orthonormality_error"] = error
    job.mark("finished", {"orthonormality_error": error, "files": chunk_digest(job.folder)})
