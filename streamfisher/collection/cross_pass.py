"""Products of the gradients of two runs where they were not kept: formed again, in one more pass with the model.

The rows of the queries, which are few, are held; those of the training samples go by batch by batch and leave a column
of products each, in float64. Whichever run kept its rows is read instead. Gradients that are formed again must have the
norms that the run has stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from streamfisher.analysis.run import StoredRun
from streamfisher.collection.with_model import tolerance_of, with_model
from streamfisher.errors import ConfigError, RunMismatchError
from streamfisher.reduction.joined_rows import CrossGram
from streamfisher.runtime.bars import Bar
from streamfisher.runtime.memory import working_memory
from streamfisher.store import RunStore

#: Of the memory, so much is for the rows of the queries.
_SHARE = 0.5
#: Values of rows that are read together.
_READ = 1 << 24


@dataclass(frozen=True)
class CrossPass:
    """Gives the products of a run's gradients with those of queries, see `InfluenceAnalyses.influence`.

    Args:
        run: of the training samples.
        model: that both runs were made with, on its device.
        data: all samples of `run`; needed where its gradients were not kept.
        query_data: all samples of the queries' run; needed where its gradients were not kept.
        loss: the one that `collect` was given.
        memory_budget: bytes; `None`: a share of what is free.
        progress: show bars.
    """

    run: StoredRun
    model: nn.Module
    data: Any = None
    query_data: Any = None
    loss: Callable[..., Tensor] | None = None
    memory_budget: int | str | None = None
    progress: bool = False

    def __call__(self, of_queries: RunStore, keys: Mapping[str, Sequence[str]]) -> dict[str, CrossGram]:
        """Return the products of groups of parameters.

        Raises:
            ConfigError: gradients were not kept and the samples to form them of are not given.
            RunMismatchError: model, samples or loss are not those of a run, or give other gradients.
            CorruptRunError: stored gradients are missing or altered.
        """
        queries = StoredRun(of_queries.path)
        self._require(self.run, self.data, "data")
        self._require(queries, self.query_data, "query_data")
        n, n_queries = self.run.n_samples, queries.n_samples
        cross = {key: np.zeros((n_queries, n)) for key in keys}
        own = {key: np.zeros((n_queries, n_queries)) for key in keys}
        key_of = {name: key for key, members in keys.items() for name in members}
        for names in self._groups(queries, list(key_of)):
            held: dict[str, np.ndarray] = {name: np.zeros((n_queries, queries.parameters[name])) for name in names}
            for start, stop, rows in self._rows(queries, self.query_data, names, "gradients of queries"):
                for name in names:
                    held[name][start:stop] = rows.pop(name)
            for name in names:
                own[key_of[name]] += held[name] @ held[name].T
            for start, stop, rows in self._rows(self.run, self.data, names, "products with queries"):
                for name in names:
                    cross[key_of[name]][:, start:stop] += held[name] @ rows.pop(name).T
        return {key: CrossGram(cross[key], own[key]) for key in keys}

    def _require(self, run: StoredRun, data: Any, option: str) -> None:
        deleted = [name for name in run.parameters if run.store.kept.is_deleted(name)]
        if data is None and deleted:
            flag = "DATA" if option == "data" else "--query-data"
            raise ConfigError(
                f"{run.path} keeps no gradients of {deleted[0]}; to form them again give its samples too: {option}= "
                f"({flag})."
            )

    def _groups(self, queries: StoredRun, names: Sequence[str]) -> Iterator[list[str]]:
        """Yield parameters whose gradients of all queries are held together."""
        room = _SHARE * working_memory(self.memory_budget)
        per_column = 8 * (queries.n_samples + max(queries.config.chunk_size, self.run.config.chunk_size))
        group: list[str] = []
        for name in names:
            if group and per_column * sum(self.run.parameters[n] for n in [*group, name]) > room:
                yield group
                group = []
            group.append(name)
        yield group

    def _rows(
        self, run: StoredRun, data: Any, names: Sequence[str], title: str
    ) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """Yield the gradients of some samples after the other, (n, P_k) float64 each: read, or formed again."""
        store = run.store
        missing = [name for name in names if store.kept.is_deleted(name)]
        if not missing:
            for start, stop in _slabs(run, names):
                yield start, stop, {name: _read(store, name, start, stop) for name in names}
            return
        with with_model(run, self.model, data, self.loss, what="multiplied") as (engine, batches):
            for unit in Bar(store.units, desc=title, unit="unit", disable=not self.progress):
                norms = store.samples.read_unit("squared_norm", unit)
                for batch in batches.of(unit):
                    buffers = engine.allocate(len(batch), names)
                    engine.rows(batches[batch], buffers, [])
                    rows = {name: values.double().cpu().numpy() for name, values in buffers.items()}
                    place = slice(batch.start - unit.start, batch.stop - unit.start)
                    self._check_norms(run, rows, norms[place], batch.start)
                    yield batch.start, batch.stop, {name: np.nan_to_num(values) for name, values in rows.items()}

    def _check_norms(self, run: StoredRun, rows: Mapping[str, np.ndarray], stored: np.ndarray, start: int) -> None:
        """Refuse gradients that are not those that a run's Grams are of.

        Raises:
            RunMismatchError: a norm differs by more than rounding.
        """
        columns = list(run.store.parameters)
        whole = np.sqrt(stored.sum(axis=1))
        for name, values in rows.items():
            norms, before = np.linalg.norm(values, axis=1), np.sqrt(stored[:, columns.index(name)])
            off = np.abs(norms - before) > tolerance_of(run) * np.maximum(before, 1e-3 * whole)
            off &= np.isfinite(before)
            if off.any():
                where = int(off.argmax())
                raise RunMismatchError(
                    f"{run.path}: the gradient of {name} of sample {start + where} has the norm {norms[where]:.6g} now "
                    f"and had {before[where]:.6g}. Use the libraries, device and settings of the model that made the "
                    "run; `streamfisher verify --deep` says where they differ."
                )


def _slabs(run: StoredRun, names: Sequence[str]) -> Iterator[tuple[int, int]]:
    width = max(1, sum(run.parameters[name] for name in names))
    rows = run.config.chunk_size
    step = max(1, _READ // width // rows) * rows
    for start in range(0, run.n_samples, step):
        yield start, min(start + step, run.n_samples)


def _read(store: RunStore, name: str, start: int, stop: int) -> np.ndarray:
    """Return stored rows of a parameter as they were before they were centered: (stop - start, P) float64."""
    rows = store.rows.columns(name, 0, store.parameters[name], slice(start, stop)).astype(np.float64)
    mean = store.rows.mean(name, 0, store.parameters[name])
    return rows if mean is None else rows + mean
