"""Runs side by side: metrics, spectra, and where they share parameters, the overlap of their leading eigenspaces.

With orthonormal bases `V_A`, `V_B` (k, P) of two k-dimensional eigenspaces, the singular values of `V_A V_B^T` are the
cosines of the principal angles between them (C. Jordan, 1875; A. Bjorck and G. Golub, "Numerical methods for computing
angles between linear subspaces", Math. Comp. 27, 1973). Their mean square is the overlap of G. Gur-Ari, D. Roberts and
E. Dyer, "Gradient descent happens in a tiny subspace", 2018: 1 for the same space, about k / P for unrelated ones.

`V = C^T G`, so `V_A V_B^T = C_A^T (G_A G_B^T) C_B` is added up over slabs of columns of both stores: neither V nor the
rows are ever held.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.eigenvectors import leading_coefficients, slabs
from streamfisher.analysis.run import StoredRun
from streamfisher.errors import ConfigError, RunError
from streamfisher.results.analyses import Comparison, Overlap
from streamfisher.results.spectrum import Spectrum
from streamfisher.store.eigenvectors import Eigenvectors, folder_name, open_eigenvectors


def compare(
    runs: Sequence[StoredRun | str | Path],
    block_structure: str | Mapping[str, str] = "layer",
    center: bool = False,
    *,
    top: int = 10,
    labels: Sequence[str] | None = None,
    bootstrap: int = 0,
    **options: Any,
) -> Comparison:
    """Compare two or more runs (checkpoints, models, data sets).

    Args:
        runs: in the order in which they are shown; overlaps are of each with the next.
        block_structure: see `Run.block_grams`.
        center: compare covariances.
        top: k, dimension of the eigenspaces whose overlap is computed; 0 means none. A block with fewer eigenvalues
            above its noise floor gives as many as both runs have.
        labels: one per run; `None` means the names of their folders.
        bootstrap: subsets of the samples for intervals of the metrics.
        options: of `Run.block_grams`: samples, weights, normalization, partial.

    Raises:
        ConfigError: there are fewer than 2 runs, or `top` is negative.
        RunError: the runs have no block in common.
    """
    if len(runs) < 2:
        raise ConfigError(f"{len(runs)} run was given; name at least 2 to compare.")
    if top < 0:
        raise ConfigError(f"--top {top} must not be negative.")
    opened = [run if isinstance(run, StoredRun) else StoredRun(run) for run in runs]
    names = tuple(labels) if labels is not None else _labels([run.path for run in opened])
    if len(names) != len(opened) or len(set(names)) < len(names):
        raise ConfigError(f"{len(opened)} runs need as many different labels, not {list(names)}.")
    grams = [run.block_grams(block_structure, center, **options) for run in opened]
    shared = [key for key in grams[0].blocks if all(key in other.blocks for other in grams[1:])]
    common = set.intersection(*(set(run.parameters.items()) for run in opened))
    if not shared or (not common and shared != ["global"]):
        raise RunError(
            f"{' and '.join(names)} share nothing: no parameter of the same name and size, and "
            f"{'no block' if not shared else 'blocks of the same names only'}. "
            "Compare their whole spectra with --blocks none, or group them with patterns of your own."
        )
    spectra = tuple(run.spectrum(block_structure, center, bootstrap=bootstrap, **options) for run in opened)
    overlaps, without = [], dict[str, None]()
    for (i, a), (j, b) in itertools.pairwise(enumerate(opened)):
        for key in shared if top else ():
            estimated = opened[i].config.max_params_per_block or a.config.project or b.config.project
            if _same_parameters(grams[i], grams[j], key) and not estimated:
                members = grams[i].blocks[key]
                gone = [run for run in (a, b) if any(run.store.kept.is_deleted(name) for name in members)]
                if gone:
                    left, right = _stored_vectors(a, grams[i], key), _stored_vectors(b, grams[j], key)
                    found = None if left is None or right is None else stored_overlap(left, right, top)
                    without |= dict.fromkeys([] if found else [key])
                else:
                    found = subspace_overlap(a, b, grams[i], grams[j], key, top)
                if found is not None:
                    overlaps.append(Overlap(key, (names[i], names[j]), *found))
    warned = _warnings(spectra, names)
    if without:
        warned += (
            f"no overlaps of {', '.join(without)}: gradients were not kept, and not all runs have eigenvectors of them",
        )
    return Comparison(names, spectra, tuple(shared), tuple(overlaps), warned)


def _stored_vectors(run: StoredRun, grams: BlockGrams, block: str) -> Eigenvectors | None:
    """Return the eigenvectors of a block that are stored with a run; `None`: there are none of these Grams."""
    if not (run.path / "done" / "eigenvectors" / folder_name(block, grams.center) / "finished.json").is_file():
        return None
    found = open_eigenvectors(run.path, block, center=grams.center)
    if sorted(found.shapes) != sorted(grams.blocks[block]):
        return None
    largest = grams.only(block).spectrum().blocks[block].eigenvalues[: len(found)]
    return found if np.allclose(found.eigenvalues, largest, rtol=1e-3) else None  # else of another choice of samples


def stored_overlap(a: Eigenvectors, b: Eigenvectors, top: int) -> tuple[np.ndarray, int]:
    """Return the cosines (k,) of the principal angles of eigenvectors that are stored, and P; a slab at a time."""
    k = min(top, len(a), len(b))
    cross, n_params = np.zeros((k, k)), 0
    theirs = b.arrays()
    for name, vectors in a.arrays().items():
        n_params += vectors.shape[1]
        width = max(vectors.chunks[1][0], 1)
        for start in range(0, vectors.shape[1], width):
            part = slice(start, start + width)
            left, right = (side[:k, part].compute().astype(np.float64) for side in (vectors, theirs[name]))
            cross += left @ right.T
    return np.minimum(np.linalg.svd(cross, compute_uv=False), 1.0), n_params


def subspace_overlap(
    a: StoredRun, b: StoredRun, grams_a: BlockGrams, grams_b: BlockGrams, block: str, top: int
) -> tuple[np.ndarray, int] | None:
    """Return the cosines (k,) of the principal angles and P; `None` where a run has no eigenvalue above its floor.

    Both bases are orthonormalised by what `V V^T` really is, in float64, so errors of the Grams do not enter.
    """
    k = min(top, _rank(grams_a, block), _rank(grams_b, block))
    if k < 1:
        return None
    C_a, C_b = leading_coefficients(grams_a, block, k), leading_coefficients(grams_b, block, k)
    cross, own_a, own_b = np.zeros((k, k)), np.zeros((k, k)), np.zeros((k, k))
    n_params = 0
    for name in grams_a.blocks[block]:
        n_params += a.parameters[name]
        width = max(a.store.rows.chunk_columns(name), b.store.rows.chunk_columns(name))
        pairs = zip(slabs(a.store, name, width), slabs(b.store, name, width), strict=True)
        for (_, _, rows_a), (_, _, rows_b) in pairs:
            V_a, V_b = C_a.T @ rows_a, C_b.T @ rows_b
            cross += V_a @ V_b.T
            own_a += V_a @ V_a.T
            own_b += V_b @ V_b.T
    left = np.linalg.solve(np.linalg.cholesky(own_a), cross)
    both = np.linalg.solve(np.linalg.cholesky(own_b), left.T)
    return np.minimum(np.linalg.svd(both, compute_uv=False), 1.0), n_params


def _rank(grams: BlockGrams, block: str) -> int:
    return int(grams.only(block).spectrum().blocks[block].above_floor.sum())


def _same_parameters(a: BlockGrams, b: BlockGrams, key: str) -> bool:
    return {n: a.parameters[n] for n in a.blocks[key]} == {n: b.parameters[n] for n in b.blocks[key]}


def _labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return the shortest ends of the paths that tell the runs apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{number + 1}: {path}" for number, path in enumerate(paths))


def _warnings(spectra: Sequence[Spectrum], labels: Sequence[str]) -> tuple[str, ...]:
    """Return in words what differs between runs besides what is compared."""
    texts = {
        "n_samples": "N differs, and ranks and tails depend on it",
        "sample_unit": "N counts different things",
        "loss": "the losses differ",
        "loss_reduction": "the losses are reduced otherwise",
        "labels": "labels of the data against labels of the model",
        "dtype_store": "rows are stored in different dtypes, with different noise floors",
        "data_fingerprint": "the data differ",
        "partial": "a run is not finished",
    }
    found = []
    for key, text in texts.items():
        values = [spectrum.metadata.get(key) for spectrum in spectra]
        if len({str(value) for value in values}) > 1:
            shown = ", ".join(f"{label}: {str(value)[:12]}" for label, value in zip(labels, values, strict=True))
            found.append(f"{text} ({shown})")
    return tuple(found)
