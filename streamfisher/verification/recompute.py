"""Is a stored run what the model gives? The gradients of a few random samples are computed again and compared.

Checksums say that what is read is what was written; this says that what was written is right. Each sample is computed
in the batch that the run had it in, by the rules that the run's probe chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamfisher.analysis.run import StoredRun
from streamfisher.collection.with_model import rounding_of, tolerance_of, with_model
from streamfisher.errors import ConfigError, CorruptRunError, RunError
from streamfisher.gradients import GradientEngine
from streamfisher.gradients.factors import FactorPair, product
from streamfisher.models.batches import ModelBatches
from streamfisher.verification.problem import Problem

#: Bytes of rows that are recomputed at a time, where one parameter alone does not take more.
_GROUP = 256 << 20
#: Columns that are compared at a time.
_SLAB = 1 << 20
#: What float32 products put on an entry of a Gram, over the norms of its two rows.
_PRODUCTS = 1e-5


def deep_problems(
    run: StoredRun,
    model: nn.Module,
    samples: Any,
    *,
    count: int,
    loss: Callable[..., Tensor] | None = None,
    seed: int = 0,
) -> list[Problem]:
    """Compute the gradients of `count` random samples again; return where the run holds something else.

    Compared are losses, rows or factors, squared norms, and the Grams' entries `K_ij` among these samples. Where
    gradients were deleted, the Grams stand for them. Of centered rows the mean is taken from the run.

    Memory: the rows of these samples and of one batch, of as many parameters as 256 MB take, at least of one.

    Raises:
        ConfigError: `count` is not a whole number of at least 1.
        RunError: no sample is finished.
        RunMismatchError: model, data or loss are not those of the run; the message says which.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"deep={count!r} must be a whole number of samples, at least 1.")
    chosen = _draw(run, count, seed)
    with with_model(run, model, samples, loss, what="verified") as (engine, batches):
        return _DeepCheck(run, engine, batches, chosen).problems()


def _draw(run: StoredRun, count: int, seed: int) -> list[int]:
    """Return `count` different finished samples, or all there are, in order; none that the run has left out."""
    done, skipped = run.store.markers.finished_units(), run.store.samples.skipped()
    units = [unit for unit in run.store.units if unit.index in done]
    numbers = [number for unit in units for number in range(unit.start, unit.stop) if number not in skipped]
    if not numbers:
        raise RunError(f"{run.path} has no finished sample to compare. Run the command that made it again first.")
    drawn = np.random.default_rng(seed).choice(len(numbers), min(count, len(numbers)), replace=False)
    return sorted(numbers[int(place)] for place in drawn)


class _DeepCheck:
    """The comparison of one run with one model, group of parameters by group."""

    def __init__(self, run: StoredRun, engine: GradientEngine, batches: ModelBatches, chosen: list[int]):
        self.run, self.store, self.engine, self.batches, self.chosen = run, run.store, engine, batches, chosen
        self.differences: list[Problem] = []
        self.rounding, self.tolerance = rounding_of(run), tolerance_of(run)
        info = torch.finfo(self.store.store_dtype)
        self.smallest = info.smallest_normal * info.eps  # what storing can put on an entry that underflows
        self.norms = self._stored("squared_norm", np.zeros((len(chosen), len(self.store.parameters))))
        self.whole = np.sqrt(np.nansum(self.norms, axis=1))
        shape = (len(chosen), len(chosen))
        self.products = {key: np.zeros(shape) for key in self.store.gram_members}
        self.slack = {key: np.zeros(len(chosen)) for key in self.store.gram_members}

    def problems(self) -> list[Problem]:
        """Return all that differs."""
        for number, names in enumerate(self._groups()):
            rows, losses = self._recompute(names)
            if number == 0:
                self._compare_losses(losses)
            for name in names:
                self._compare(name, rows.pop(name))
        for key in filter(self.store.grams.has, self.store.gram_members):
            self._compare_gram(key)
        return self.differences

    def _groups(self) -> Iterator[list[str]]:
        """Yield parameters of one wave whose rows are recomputed together."""
        per_column = (len(self.chosen) + self.store.chunk_rows) * self.engine.row_dtype.itemsize
        for wave in self.store.waves:
            group: list[str] = []
            for name in wave:
                if group and per_column * sum(self.store.parameters[n] for n in [*group, name]) > _GROUP:
                    yield group
                    group = []
                group.append(name)
            yield group

    def _recompute(self, names: list[str]) -> tuple[dict[str, Tensor], np.ndarray]:
        """Return rows (K, P_k) of parameters, not centered, and losses (K,)."""
        store, engine = self.store, self.engine
        rows = {name: torch.zeros(len(self.chosen), store.parameters[name], dtype=engine.row_dtype) for name in names}
        losses = np.zeros(len(self.chosen))
        held = [n for n in names if store.rows.representation(n) == "factors" and n in engine.factorable]
        for unit in store.units:
            if not any(number in range(unit.start, unit.stop) for number in self.chosen):
                continue
            for batch in self.batches.of(unit):
                numbers = batch.samples
                wanted = [place for place, number in enumerate(self.chosen) if number in numbers]
                if not wanted:
                    continue
                out = engine.allocate(len(numbers), [name for name in names if name not in held])
                result = engine.rows(self.batches[batch], out, held)
                for place in wanted:
                    offset = self.chosen[place] - numbers.start
                    losses[place] = result.losses[offset]
                    for name in names:
                        rows[name][place] = self._row(name, offset, out, result.factors)
        return rows, losses

    def _row(self, name: str, offset: int, out: dict[str, Tensor], factors: Any) -> Tensor:
        if name in out:
            return out[name][offset]
        pairs = [FactorPair(pair.left[offset : offset + 1], pair.right[offset : offset + 1]) for pair in factors[name]]
        if not pairs:
            return torch.zeros(self.store.parameters[name], dtype=self.engine.row_dtype)
        return product(pairs, self.store.rows.shape(name), self.engine.row_dtype)[0]

    def _compare(self, name: str, rows: Tensor) -> None:
        """Compare a parameter's rows and norms, and add its products to those of its Gram."""
        size, kept = self.store.parameters[name], not self.store.kept.is_deleted(name)
        sizes = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).numpy()
        noise = self.rounding * np.maximum(self.whole, sizes) + self.smallest * size**0.5
        squares, squared_differences = np.zeros(len(rows)), np.zeros(len(rows))
        keys = self.store.grams.keys_of([name])
        readable = [kept] * len(rows)
        for start in range(0, size, _SLAB):
            stop = min(start + _SLAB, size)
            part = rows[:, start:stop].double().numpy()
            if self.store.centered:
                part = part - np.asarray(self.store.means.mean(name, start, stop))
            squares += (part**2).sum(axis=1)
            for key in keys:
                self.products[key] += part @ part.T
            for place in map(int, np.flatnonzero(readable)):
                try:
                    stored = self._columns(name, start, stop, self.chosen[place])
                except CorruptRunError as error:
                    self._report("rows", name, place, f"cannot be read ({error})")
                    readable[place] = False
                    continue
                squared_differences[place] += ((stored - part[place]) ** 2).sum()
        allowed = self.tolerance * np.sqrt(squares) + noise
        column = self.store.run.columns[name]
        for key in keys:
            self.slack[key] += noise
        for place, norm in enumerate(np.sqrt(squares)):
            if readable[place]:
                self._judge("rows", name, place, squared_differences[place] ** 0.5, norm, allowed[place])
            off = abs(np.sqrt(self.norms[place, column]) - norm)
            self._judge("squared_norm", name, place, off, norm, allowed[place])

    def _columns(self, name: str, start: int, stop: int, sample: int) -> np.ndarray:
        return self.store.rows.columns(name, start, stop, rows=slice(sample, sample + 1))[0].astype(np.float64)

    def _compare_losses(self, losses: np.ndarray) -> None:
        stored = self._stored("loss", losses)
        for place, (one, other) in enumerate(zip(stored, losses, strict=True)):
            if np.isfinite(one) or np.isfinite(other):
                self._judge("loss", None, place, abs(one - other), abs(other), self.tolerance * max(1.0, abs(other)))

    def _compare_gram(self, key: str) -> None:
        """Compare the entries of a Gram among the samples; the worst one is named."""
        products = self.products[key]
        sizes = np.sqrt(np.diagonal(products))
        wide = sizes + (self.tolerance + _PRODUCTS) * sizes + self.slack[key]
        allowed = np.outer(wide, wide) - np.outer(sizes, sizes)
        worst, detail = 1.0, None
        for i, sample in enumerate(self.chosen):
            try:
                stored = self.store.grams.tile(key, slice(sample, sample + 1), slice(None))
            except CorruptRunError as error:
                self.differences.append(Problem("gram", key, sample, sample, f"cannot be read ({error})"))
                return
            for j in range(i + 1):
                if max(self.chosen[i], self.chosen[j]) >= stored.shape[1]:
                    continue  # of before the run grew
                off = abs(stored[0, self.chosen[j]] - products[i, j])
                if not off <= worst * allowed[i, j]:
                    worst = off / max(allowed[i, j], np.finfo(float).tiny)
                    detail = (self.chosen[j], sample, _differs(off, sizes[i] * sizes[j]))
        if detail is not None:
            self.differences.append(Problem("gram", key, *detail))

    def _stored(self, what: str, like: np.ndarray) -> np.ndarray:
        """Return per-sample values of the samples; what cannot be read is reported, and NaN."""
        try:
            return self.store.samples.per_sample(what)[self.chosen]
        except CorruptRunError as error:
            self.differences.append(Problem(what, None, self.chosen[0], self.chosen[-1], str(error)))
            return np.full_like(like, np.nan)

    def _judge(self, what: str, name: str | None, place: int, off: float, size: float, allowed: float) -> None:
        if not off <= allowed:  # NaN is a difference too
            self._report(what, name, place, _differs(off, size))

    def _report(self, what: str, name: str | None, place: int, detail: str) -> None:
        self.differences.append(Problem(what, name, self.chosen[place], self.chosen[place], detail))


def _differs(off: float, size: float) -> str:
    relative = f"a relative difference of {off / size:.1e}" if size > 0 else f"{off:.1e} where it gives zero"
    return f"not what the model gives: {relative}"
