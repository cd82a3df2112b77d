"""What the stages of a run take: operations, bytes, memory and time of collecting, reducing and solving."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from streamfisher.blocks.gram_keys import gram_keys
from streamfisher.blocks.structures import assign_blocks
from streamfisher.byte_sizes import parse_bytes
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import guarded_share, make_units
from streamfisher.errors import CapacityError
from streamfisher.gradients.probe import PROBE_SAMPLES
from streamfisher.gradients.shapes import GradientShape
from streamfisher.planning.costs import (
    ProductCost,
    eigensolve_flops,
    forming_flops,
    norm_flops,
    plain_flops,
    product_cost,
)
from streamfisher.planning.machine import Machine, or_any
from streamfisher.planning.model_trace import ModelTrace
from streamfisher.planning.rates import Rates
from streamfisher.planning.representation import Representation
from streamfisher.planning.strategy import Stage
from streamfisher.reduction.folds import dtype_of_products
from streamfisher.reduction.gram import share_memory
from streamfisher.reduction.kernels import FactorUse, least_kernel_bytes, slab_memory
from streamfisher.reduction.slabs import DECODING_BYTES, least_bytes, slabs_within, sums_bytes
from streamfisher.reduction.tiles import needs_tiles, tile_bytes, tile_workers
from streamfisher.runtime.threads import worker_count
from streamfisher.solving.tiled_solve import dense_bytes, solves_dense
from streamfisher.store.layout import chunk_columns
from streamfisher.store.packs import make_packs

#: Plain passes over each of its samples that the probe takes, and how often it compares their gradients.
_PROBE_PASSES = 8
_PROBE_COMPARISONS = 5
#: Small arrays of each Gram: it is written, its norms are read to be held against it, and it is marked.
_OF_A_GRAM = 3
#: float64 operations take as much longer than float32 ones.
_FLOAT64 = 2.0


class StageCosts:
    """The stages of a run of N samples, by whichever strategy.

    Args:
        trace: of the model.
        rows: shapes of the gradients, projected where they are.
        config: of the run.
        machine: what there is to work with.
        rates: of that machine.
        batches: samples of each batch.
        row_dtype: in which rows are computed.
        structures: how many block structures are solved.
    """

    def __init__(
        self,
        trace: ModelTrace,
        rows: Sequence[GradientShape],
        config: SpectralConfig,
        machine: Machine,
        rates: Rates,
        batches: Sequence[int],
        row_dtype: torch.dtype,
        structures: int = 1,
    ):
        self.trace, self.rows, self.config, self.machine, self.rates = trace, list(rows), config, machine, rates
        self.n, self.batches, self.structures = sum(batches), list(batches), structures
        self.row_itemsize = row_dtype.itemsize
        self.stored_itemsize = (config.dtype_store or row_dtype).itemsize
        self._budget = parse_bytes(config.memory_budget) if config.memory_budget else None
        self._read_dtype = np.dtype("float64" if row_dtype == torch.float64 else "float32")  # of rows that are read
        self.n_units = len(make_units(self.n, config.chunk_size))
        self.n_grams = len(gram_keys([shape.name for shape in self.rows], config.gram_per))
        self.gram_bytes = 8.0 * self.n**2 * self.n_grams
        self.widest = max(self._chunk_columns(shape) for shape in self.rows)

    def collect(
        self,
        flops: float,
        size: float,
        memory: float,
        chosen: Mapping[str, Representation],
        waves: int,
        *,
        hold: str = "disk",
        away: float = 0.0,
    ) -> Stage:
        """Return the stage that takes gradients to where they are held.

        Args:
            flops: of one sample.
            size: bytes of all gradients.
            memory: bytes of the host at its peak.
            chosen: how each parameter is held.
            waves: passes over the data.
            hold: where gradients are.
            away: bytes of those that are in host memory where the others are on the device.
        """
        stored = hold == "disk"
        guards = 0  # samples of the batches that the guard compares, in all waves
        if self.config.guard_every:
            guarded = min(2 * -(-self.n_units // self.config.guard_every), len(self.batches))
            guards = waves * guarded * min(self.batches[0], guarded_share(self.n, guarded))
        plain = plain_flops(self.trace.blocks) * (guards + PROBE_SAMPLES * _PROBE_PASSES)
        total = self.n * flops + plain
        chunks, arrays = self._pieces(chosen) if stored else (0, 0)
        norms = ((self.n if stored else 0) + guards / waves) * norm_flops(self.trace.shapes, chosen)
        sums = guards / waves * forming_flops(self.trace.shapes, chosen, "factors")
        dense = sum(shape.numel for shape in self.rows if chosen[shape.name] == "dense")
        compared = PROBE_SAMPLES * _PROBE_COMPARISONS * self.trace.n_params + guards / waves * dense
        seconds = total / self.rates.passes + _FLOAT64 * norms / self.rates.forming
        seconds += sums / self.rates.forming + compared * self.rates.compare_seconds
        behind = chunks * self.rates.chunk_seconds + arrays * self.rates.array_seconds
        behind += size / self.rates.write if stored else 0.0
        if self.machine.devices and self.rates.transfer:
            behind += (away if hold == "device" else size) / self.rates.transfer
        # Written behind: beside a device that costs what it takes longer; where the same cores compute, it adds up.
        seconds = max(seconds, behind) if self.machine.devices and stored else seconds + behind
        return Stage("collect", total + norms + sums, 0.0, size if stored else 0.0, memory, seconds)

    def reduce(
        self,
        size: float,
        chosen: Mapping[str, Representation],
        *,
        hold: str = "disk",
        away: Collection[str] = (),
    ) -> Stage:
        """Return the stage that forms rows of factors where needed, and multiplies.

        Args:
            size: bytes of all gradients.
            chosen: how each parameter is held.
            hold: where gradients are.
            away: parameters whose gradients are in host memory where the others are on the device.
        """
        stored = hold == "disk"
        narrow = self.config.dtype_gram != torch.float64  # else the rate is that of float64 products already
        forming = products = seconds = 0.0
        for shape in self.rows:
            cost = self._product_cost(shape, chosen)
            on_host = (hold != "device" or shape.name in away) and self.config.gram_device == "cpu"
            rates = self.rates.on_host() if on_host else self.rates
            wide = narrow and self._itemsize(shape) == 8 and cost.kernel == "slabs"
            product = cost.product * (_FLOAT64 if wide else 1.0)
            seconds += cost.forming / rates.forming + product / rates.products
            forming, products = forming + cost.forming, products + product
        chunks, arrays = self._pieces(chosen) if stored else (0, 0)
        seconds += size / self.rates.read if stored else 0.0
        seconds += (chunks + arrays) * self.rates.chunk_seconds + _OF_A_GRAM * self.n_grams * self.rates.array_seconds
        seconds += self.gram_bytes / self.rates.write
        read = size if stored else 0.0
        return Stage("reduce", forming + products, read, self.gram_bytes, self._reduction_memory(chosen), seconds)

    def solve(self) -> Stage:
        """Return the stage that solves the blocks of every structure."""
        names = [shape.name for shape in self.rows]
        blocks = len(set(assign_blocks(names, self.config.block_structure).values())) * self.structures
        flops = blocks * eigensolve_flops(self.n)
        read = self.structures * self.gram_bytes
        memory = min(float(dense_bytes(self.n, self.n)), or_any(self.machine.memory))  # by tiles, it is within
        return Stage("solve", flops, read, 0.0, memory, flops / self.rates.solve + read / self.rates.read)

    def problems(self, chosen: Mapping[str, Representation]) -> list[str]:
        """Return what the reduction and the solver lack, in the words in which the run would refuse."""
        problems = []
        memory = int(or_any(self.machine.memory))
        for check in (lambda: self._workers(chosen), lambda: solves_dense(self.n, self.n, self.config, memory)):
            try:
                check()
            except CapacityError as error:
                problems.append(str(error))
        return problems

    def notes(self) -> list[str]:
        """Return what comes out otherwise than with more memory."""
        memory = self.machine.memory
        if memory is None or self.config.solver == "dense" or dense_bytes(self.n, self.n) <= memory:
            return []
        return [
            "Grams are larger than the memory and are solved by tiles: only the largest eigenvalues of a block are "
            f"found (--top-k), not all {self.n}."
        ]

    def least_memory(self, chosen: Mapping[str, Representation], collecting: float) -> float:
        """Return the least bytes in which the run is reduced and solved, no less than `collecting` takes."""
        workers = self.config.n_workers or 1
        least = max(collecting, float(min(least_bytes(self.n), tile_bytes(1, self.widest))))
        if least >= least_bytes(self.n):  # then no tiles are made
            least = max(least, float(workers * max(least_bytes(self.n), self._of_factors(chosen))))
        return max(least, float(dense_bytes(self.n, self.n))) if self.config.solver == "dense" else least

    def sample_bytes(self) -> float:
        """Return the bytes of what is kept of each sample: loss, targets, validity, a norm for each parameter."""
        return self.n * (8.0 + 8.0 + 1.0 + 8.0 * len(self.rows))

    def _pieces(self, chosen: Mapping[str, Representation]) -> tuple[int, int]:
        """Return the chunks of rows, and the arrays of factors: each tensor of each batch is one."""
        dense = {shape.name: shape.columns for shape in self.rows if chosen[shape.name] == "dense"}
        packs = make_packs(
            dense,
            [list(dense)],
            dict.fromkeys(dense, True),
            n_samples=self.n,
            chunk_rows=self.config.chunk_size,
            itemsize=self.stored_itemsize,
        )
        packed = {name for names in packs.values() for name in names}
        chunks = self.n_units * (4 + len(packs))
        keys = set()
        for shape in self.rows:
            if shape.name in dense:
                alone = shape.name not in packed
                chunks += self.n_units * -(-shape.columns // self._chunk_columns(shape)) if alone else 0
            else:
                keys |= {side.key for pair in shape.pairs for side in pair}
        return chunks, len(self.batches) * len(keys) + len(packs) + len(dense) - len(packed)

    def _chunk_columns(self, shape: GradientShape) -> int:
        return chunk_columns(shape.columns, self.n, self.config.chunk_size, self.stored_itemsize, self._budget)

    def _itemsize(self, shape: GradientShape) -> int:
        """Return the bytes of a number in the products of a parameter's rows."""
        return dtype_of_products(shape.columns, self.config.dtype_gram, self._read_dtype).itemsize

    def _product_cost(self, shape: GradientShape, chosen: Mapping[str, Representation]) -> ProductCost:
        return product_cost(shape, chosen[shape.name], self.n, self._itemsize(shape) == 4)

    def _workers(self, chosen: Mapping[str, Representation]) -> tuple[int, int] | None:
        """Return workers, and bytes for each; `None` where Grams are made by tiles.

        Raises:
            CapacityError: not even one worker has the memory it needs.
        """
        memory = int(or_any(self.machine.memory))
        if needs_tiles(self.n, memory, self.widest):
            return None
        of_rows = least_bytes(self.n) if "dense" in chosen.values() else 0
        return share_memory(self.n, of_rows, self._of_factors(chosen), self.config, memory)

    def _of_factors(self, chosen: Mapping[str, Representation]) -> int:
        """Return the least bytes in which one worker reduces the factors of any parameter."""
        least = 0
        for shape in self.rows:
            if chosen[shape.name] == "factors":
                kernel = self._product_cost(shape, chosen).kernel
                longest = int(max(self.batches) * sum(shape.positions))
                least = max(least, least_kernel_bytes(kernel, self._use(shape), longest, self._itemsize(shape)))
        return least

    def _reduction_memory(self, chosen: Mapping[str, Representation]) -> float:
        """Return the bytes of all workers, which are fewer, or have smaller slabs, where the budget says so."""
        memory = int(or_any(self.machine.memory))
        try:
            shared = self._workers(chosen)
        except CapacityError:  # which is a problem already: what one worker needs
            return float(max(least_bytes(self.n), self._of_factors(chosen)))
        if shared is None:
            workers = tile_workers(worker_count(self.config), memory, self.widest)
            return float(workers * tile_bytes(1, self.widest))
        workers, budget = shared
        largest = max(self._worker_bytes(shape, chosen, budget) for shape in self.rows)
        return float(min(workers * largest + DECODING_BYTES, max(memory, workers * sums_bytes(self.n))))

    def _worker_bytes(self, shape: GradientShape, chosen: Mapping[str, Representation], budget: int) -> int:
        """Return what one worker takes for a parameter: sums, and slabs of rows, or formed rows and their factors."""
        itemsize = self._itemsize(shape)
        if chosen[shape.name] == "dense":
            held = self._read_dtype.itemsize
            beside = (self.stored_itemsize if self.stored_itemsize != held else 0) + (8 if itemsize > held else 0)
            slabs = slabs_within(
                self.n, shape.columns, self._chunk_columns(shape), held=held, beside=beside, budget=budget
            )
            return sums_bytes(self.n) + slabs.size
        if self._product_cost(shape, chosen).kernel != "slabs":
            return sums_bytes(self.n)
        _, whole = slab_memory(self._use(shape), itemsize)
        return min(whole, budget)

    def _use(self, shape: GradientShape) -> FactorUse:
        """Return how the factors of a parameter will be used."""
        width = shape.pairs[0][1].width
        by_index = sum(left.width == 1 for left, _ in shape.pairs)
        matrix = (shape.numel // width, width)
        return FactorUse(matrix, self.n, int(self.n * sum(shape.positions)), by_index, len(shape.pairs))
