"""Stored eigenvectors, read: lazy Dask arrays, tensors shaped like the parameters, projections of gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import torch
import zarr
from torch import Tensor

from streamfisher.errors import CorruptRunError, DataError, RunError, StreamfisherError, unreadable
from streamfisher.runtime.durable import read_json
from streamfisher.runtime.paths import expanded
from streamfisher.store.arrays import values_of
from streamfisher.store.forms import EIGENVECTORS, GRAM, eigenvector_marker, require_form
from streamfisher.store.gram_tiles import gram_checksums
from streamfisher.store.integrity import chunk_digest, require_inside
from streamfisher.store.names import node_name
from streamfisher.store.opening import open_array


@dataclass(frozen=True)
class Eigenvectors:
    """The k leading eigenvectors of one block's Fisher (or covariance), stored in a run.

    Vectors of unit length over all parameters of the block together; the sign is such that the sample that contributes
    most does so positively.
    """

    path: Path  # the Zarr group
    block: str
    centered: bool
    eigenvalues: np.ndarray  # (k,) float64, descending; Ritz values, from float64 products
    shapes: Mapping[str, tuple[int, ...]]  # of each parameter of the block
    orthonormality_error: float  # max |V V^T - I|, of the vectors as stored

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def arrays(self) -> dict[str, dask.array.Array]:
        """Return `{parameter name: (k, P_k)}`, lazy: nothing is read until it is computed."""
        return {name: dask.array.from_zarr(self._zarr(name)) for name in self.shapes}

    def tensors(self) -> dict[str, Tensor]:
        """Return `{parameter name: (k, *shape of the parameter)}`, all in memory."""
        return {
            name: torch.from_numpy(self._read(name, ...)).reshape(-1, *shape) for name, shape in self.shapes.items()
        }

    def direction(self, index: int) -> dict[str, Tensor]:
        """Return one eigenvector as `{parameter name: tensor of its shape}`, ready to be added to the model.

        Raises:
            DataError: there is no such eigenvector.
        """
        if not -len(self) <= index < len(self):
            raise DataError(f"there is no eigenvector {index}; {len(self)} are stored, 0 to {len(self) - 1}.")
        index %= len(self)
        return {name: torch.from_numpy(self._read(name, index)).reshape(shape) for name, shape in self.shapes.items()}

    def projections(self) -> np.ndarray:
        """Return `<g_i, v_j>` of every stored (uncentered) gradient, (N, k) float64; NaN for skipped samples."""
        return _readable(self.path, lambda: values_of(open_array(self.path / "projections", complete=True)))

    def project(self, gradients: Mapping[str, Tensor | np.ndarray]) -> np.ndarray:
        """Return `<g_i, v_j>` of new gradients, (m, k) float64.

        Args:
            gradients: for every parameter of the block `(m, *shape)` or `(m, P_k)`; further parameters are ignored.

        Raises:
            DataError: a parameter is missing or has another size.
        """
        missing = [name for name in self.shapes if name not in gradients]
        if missing:
            raise DataError(
                f"gradients of {missing[0]} are missing; block {self.block} needs {', '.join(self.shapes)}."
            )
        total: np.ndarray | None = None
        for name, shape in self.shapes.items():
            rows = torch.as_tensor(gradients[name]).detach().to("cpu", torch.float64)
            columns = int(np.prod(shape, dtype=np.int64))
            if rows.ndim < 1 or rows.shape[0] * columns != rows.numel():
                raise DataError(f"gradients of {name} have the shape {tuple(rows.shape)}, not (m, {columns}).")
            flat = rows.reshape(rows.shape[0], columns).numpy()
            array = self._zarr(name)
            part = np.zeros((len(flat), len(self)))
            for start in range(0, columns, array.chunks[1]):
                stop = min(start + array.chunks[1], columns)
                part += flat[:, start:stop] @ self._read(name, (slice(None), slice(start, stop))).astype(np.float64).T
            if total is not None and len(part) != len(total):
                raise DataError(f"gradients of {name} have {len(part)} samples and those before it {len(total)}.")
            total = part if total is None else total + part
        assert total is not None  # a block has at least one parameter
        return total

    def save_safetensors(self, path: str | Path) -> Path:
        """Write `{parameter name: (k, *shape)}` and `eigenvalues` to a safetensors file; return its path."""
        from safetensors.torch import save_file

        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        tensors["eigenvalues"] = torch.from_numpy(self.eigenvalues.copy())
        save_file(tensors, str(path), metadata={"block": self.block, "centered": str(self.centered).lower()})
        return Path(path)

    def to_dict(self) -> dict[str, Any]:
        """Return what is stored where, as plain JSON values."""
        return {
            "path": str(self.path),
            "block": self.block,
            "centered": self.centered,
            "eigenvalues": [float(value) for value in self.eigenvalues],
            "parameters": {name: list(shape) for name, shape in self.shapes.items()},
            "orthonormality_error": self.orthonormality_error,
        }

    def _read(self, name: str, which: Any) -> np.ndarray:
        """Return part of the vectors over one parameter.

        Raises:
            CorruptRunError: they cannot be read.
        """
        return _readable(self.path, lambda: values_of(self._zarr(name), which))

    def _zarr(self, name: str) -> zarr.Array:
        return open_array(self.path / "vectors" / node_name(name), complete=True)


def _readable(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        return read()
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise unreadable(
            error, f"{path} cannot be read ({error}); `streamfisher verify --repair` clears it, to be made again."
        ) from error


def folder_name(block: str, center: bool) -> str:
    """Return the folder below `eigenvectors/` of a block."""
    return node_name(block) + (".centered" if center else "")


def read_marker(marks: Path, what: str) -> Any:
    """Return what one of the markers of eigenvectors says.

    Args:
        marks: the folder of their markers.
        what: its name.

    Raises:
        CorruptRunError: it is not there, damaged, or another one.
    """
    path = marks / f"{what}.json"
    content = read_json(path)
    require_form(content, eigenvector_marker(what), path)
    if content.get("marker", what) != what:
        raise CorruptRunError(f"{path} is another marker.")
    return content


def open_eigenvectors(run: str | Path, block: str, *, center: bool = False) -> Eigenvectors:
    """Open the eigenvectors of a block that `streamfisher eigenvectors` wrote.

    Args:
        run: folder of the run.
        block: its key.
        center: those of the covariance.

    Raises:
        RunError: there are none, they are not finished, or the Grams changed since.
    """
    run = expanded(run)
    folder = folder_name(block, center)
    marks = run / "done" / "eigenvectors" / folder
    if not (marks / "finished.json").is_file():
        state = "not finished" if marks.is_dir() else "not there"
        raise RunError(
            f"{run}: eigenvectors of block {block} are {state}; `streamfisher eigenvectors {run} --block {block}` "
            "makes them."
        )
    path = run / "eigenvectors" / folder
    identity, finished = read_json(marks / "identity.json"), read_marker(marks, "finished")
    require_form(identity, EIGENVECTORS, marks / "identity.json")
    require_inside(run, path)
    if finished.get("files") not in (None, chunk_digest(path)):
        raise CorruptRunError(
            f"{path} is not what was written; `streamfisher verify --repair` clears it, to be made again."
        )
    try:
        return _opened(run, path, block, center, identity, finished)
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, StreamfisherError):
            raise
        raise unreadable(
            error, f"{path} is damaged ({error}); `streamfisher verify --repair` clears it, to be made again."
        ) from error


def _opened(
    run: Path, path: Path, block: str, center: bool, identity: Mapping[str, Any], finished: Mapping[str, Any]
) -> Eigenvectors:
    for name, checksum in zip(identity.get("gram_keys", identity["parameters"]), identity["grams"], strict=True):
        gram = run / "done" / f"gram-{node_name(name)}.json"
        tiles = run / "done" / f"tiles-{node_name(name)}"
        marker = read_json(gram) if gram.is_file() else None
        if marker is not None:
            require_form(marker, GRAM, gram)
        if marker is None or gram_checksums(marker, tiles) != checksum:
            raise RunError(
                f"{run}: the Gram of {name} is not the one that the eigenvectors of {block} were made from; "
                "`streamfisher eigenvectors --overwrite` makes them again."
            )
    shapes: dict[str, tuple[int, ...]] = {}
    for name in identity["parameters"]:
        shape: Any = open_array(path / "vectors" / node_name(name)).attrs["parameter_shape"]
        shapes[name] = tuple(shape)
    return Eigenvectors(
        path=path,
        block=block,
        centered=center,
        eigenvalues=values_of(open_array(path / "eigenvalues", complete=True)),
        shapes=shapes,
        orthonormality_error=finished["orthonormality_error"],
    )
