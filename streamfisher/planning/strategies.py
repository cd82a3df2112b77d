"""The ways of doing a run, each with its bytes, passes, memory and time.

dense, one pass     every row on disk at once, as rows
one pass            every gradient on disk at once, rows or factors, whichever are smaller
waves               what the disk and memory budgets allow at a time, one pass for each
stream layers       boundaries of all samples are kept, and one layer after the other is replayed and reduced
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from streamfisher.blocks.gram_keys import gram_keys
from streamfisher.blocks.structures import assign_blocks
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import make_units
from streamfisher.errors import CapacityError
from streamfisher.gradients.probe import PROBE_SAMPLES
from streamfisher.gradients.projection import projected
from streamfisher.gradients.shapes import GradientShape
from streamfisher.planning.costs import (
    eigensolve_flops,
    forming_flops,
    norm_flops,
    pass_flops,
    plain_flops,
    product_cost,
    reduction_bytes,
    streamed_flops,
)
from streamfisher.planning.machine import Machine
from streamfisher.planning.model_trace import ModelTrace
from streamfisher.planning.rates import Rates
from streamfisher.planning.representation import Representation, choose_representation, sample_bytes
from streamfisher.planning.run_layout import boundary_room, cut_and_hold, fit_batches, samples_of_batches, wave_limits
from streamfisher.planning.shortfalls import Shortfalls, or_any
from streamfisher.planning.strategy import BlockBytes, Stage, Strategy
from streamfisher.planning.waves import WaveSizes
from streamfisher.reduction.gram import WIDE
from streamfisher.reduction.slabs import DECODING_BYTES, least_bytes
from streamfisher.solving.tiled_solve import dense_bytes
from streamfisher.store.kept import is_kept
from streamfisher.store.layout import chunk_columns

#: Forward and backward hold temporary tensors of about half of what autograd saves.
TEMPORARY = 1.5
#: Of a memory budget, at most this share is for the activations of a batch; of devices, for weights that stay there.
_SHARE = 0.5
#: Plain passes over each of its samples that the probe takes, and how often it compares their gradients.
_PROBE_PASSES = 8
_PROBE_COMPARISONS = 5
#: Small arrays of each Gram: it is written, its norms are read to be held against it, and it is marked.
_OF_A_GRAM = 3
#: float64 operations take as much longer than float32 ones.
_FLOAT64 = 2.0


class StrategyPlanner:
    """The numbers that all ways share."""

    def __init__(
        self,
        trace: ModelTrace,
        lengths: Sequence[int],
        config: SpectralConfig,
        machine: Machine,
        rates: Rates,
        structures: int = 1,
    ):
        self.trace, self.config, self.machine, self.rates = trace, config, machine, rates
        self.lengths = list(lengths)
        self.n = len(lengths)
        self.structures = structures
        self.rows = projected(trace.shapes, config.project)
        self.shapes = {shape.name: shape for shape in self.rows}
        double = any(shape.dtype == torch.float64 for shape in trace.shapes)
        row_dtype = torch.float64 if double else config.dtype_compute
        self.store_dtype = config.dtype_store or row_dtype
        self.row_itemsize = torch.finfo(row_dtype).bits // 8
        self.stored_itemsize = torch.finfo(self.store_dtype).bits // 8
        self.n_grams = len(gram_keys(self.shapes, config.gram_per))
        self.gram_bytes = 8.0 * self.n**2 * self.n_grams
        self.units = make_units(self.n, config.chunk_size)
        on_host = machine.devices == 0
        self.per_token = TEMPORARY * trace.activation_bytes / trace.tokens  # of activations
        self.host_per_token = self.per_token if on_host else 0.0
        self.batch_tokens = self._batch_tokens()
        self.shortfalls = Shortfalls(machine, config, self.n, self.gram_bytes, trace.weight_bytes)
        self.batches = samples_of_batches(self.lengths, config.chunk_size, self.batch_tokens)

    def _batch_tokens(self) -> int:
        """Return the padded tokens of one backward pass: by the run's own rule, and on devices as many as fit."""
        machine, longest = self.machine, max(self.lengths)
        if machine.devices == 0 or machine.device_memory is None or self.per_token <= 0:
            _, factors = sample_bytes(self.rows, self.held(self.config.representation), 1)
            try:
                memory = int(or_any(machine.memory))
                return fit_batches(self.config, self.lengths, self.host_per_token, factors, memory)
            except CapacityError:  # which the shortfalls of memory say in their own words
                return longest
        free = max(machine.device_memory * machine.devices - self.trace.weight_bytes, 0) * _SHARE / machine.devices
        return max(longest, min(self.config.batch_tokens, int(free / self.per_token)))

    @property
    def padded(self) -> int:
        """Return the tokens of the largest batch."""
        return max(self.batch_tokens, max(self.lengths)) if max(self.batches) > 1 else max(self.lengths)

    def sizes(self, chosen: Mapping[str, Representation]) -> WaveSizes:
        """Return the sizes of groups of parameters that are held so."""
        return WaveSizes(
            self.rows,
            chosen,
            n_samples=self.n,
            unit_rows=min(self.config.chunk_size, self.n),
            batch_samples=max(self.batches),
            row_itemsize=self.row_itemsize,
            stored_itemsize=self.stored_itemsize,
        )

    def held(self, representation: str) -> dict[str, Representation]:
        """Return how each parameter is held."""
        return choose_representation(
            self.rows,
            representation,
            row_itemsize=self.stored_itemsize,
            centered=self.config.store_centered,
        )

    def block_bytes(self) -> tuple[BlockBytes, ...]:
        """Return the blocks of the layer structure and what their gradients take."""
        chosen = self.held(self.config.representation)
        factored: dict[str, Representation] = {s.name: "factors" if s.pairs else "dense" for s in self.trace.shapes}
        members: dict[str, list[str]] = {}
        for name, key in assign_blocks(self.shapes, "layer").items():
            members.setdefault(key, []).append(name)
        found = []
        for key, names in members.items():
            shapes = [self.shapes[name] for name in names]
            rows = float(sum(shape.numel for shape in shapes) * self.stored_itemsize)
            factors = math.fsum(sample_bytes(shapes, factored, self.stored_itemsize))
            stored = math.fsum(sample_bytes(shapes, chosen, self.stored_itemsize))
            n = self.n
            found.append(BlockBytes(key, sum(shape.numel for shape in shapes), n * rows, n * factors, n * stored))
        return tuple(found)

    def stored(self, name: str, representation: str, *, budgets: bool) -> Strategy:
        """Return a way that keeps gradients on disk: at once, or in waves where budgets are to be met."""
        chosen = self.held(representation)
        sizes = self.sizes(chosen)
        problems = self.shortfalls.of_reduction(self._least_reduction()) + self.shortfalls.of_weights()
        names = list(self.shapes)
        cut, hold = [sizes.of(names)], "disk"
        hopeless = False
        if budgets:
            limits = wave_limits(
                self.rows,
                self.n,
                self.config,
                disk=or_any(self.machine.disk),
                memory=or_any(self.machine.memory),
                gram_bytes=self.gram_bytes,
                activations=self.host_per_token * self.padded,
            )
            whole = sizes.of(names)
            keep = self.config.keep_gradients
            if keep is None:
                keep = ("*",) if whole.disk <= limits.disk and whole.memory <= limits.memory else ()
            try:
                cut, hold = cut_and_hold(sizes, limits, keep, self.config, None)
            except CapacityError as error:
                problems.append(str(error))
                hopeless = True
        waves = [list(wave.parameters) for wave in cut]
        kept = "*" in (self.config.keep_gradients or ())
        total = sum(wave.disk for wave in cut)
        largest = max(wave.disk for wave in cut)
        held = largest if hold == "host" else 0
        disk = self.gram_bytes + (0 if held else total if kept else largest) + self._sample_bytes()
        memory = self.host_per_token * self.padded + max(wave.memory for wave in cut) + held
        if not hopeless:  # else the numbers are those of a single wave, which nobody would try
            problems += self.shortfalls.of_disk(disk, self.stored_itemsize) + self.shortfalls.of_memory(memory)
        passes = sum(pass_flops(self.trace.blocks, wave) for wave in waves)
        flops = passes + forming_flops(self.trace.shapes, chosen, "dense")
        collect = self._collect(flops, 0 if held else total, memory, chosen, len(waves), stored=not held)
        return Strategy(
            name=name,
            waves=len(waves),
            passes=passes / plain_flops(self.trace.blocks),
            gradients=0.0 if held else float(total),
            disk=disk,
            weights=float(self.trace.weight_bytes),
            stages=(collect, self._reduce(0 if held else total, chosen, stored=not held), self._solve()),
            problems=tuple(dict.fromkeys(problems)),
            representation=chosen,
            hold=hold,
        )

    def streamed(self) -> Strategy:
        """Return the way that replays one layer at a time."""
        chosen = self.held(self.config.representation)
        sizes = self.sizes(chosen)
        segments = [block for block in self.trace.blocks if block.parameters]
        parts = [sizes.of(block.parameters) for block in segments]
        largest, total = max(part.disk for part in parts), sum(part.disk for part in parts)
        edges = [block.boundary_bytes for block in self.trace.blocks if block.boundary_bytes]
        problems = self.shortfalls.of_reduction(self._least_reduction())
        if not edges:
            problems.append(f"{self.trace.name} is not a stack of layers that call one another: use waves.")
        every, boundaries = self._boundaries(edges)
        room = boundary_room(or_any(self.machine.disk))
        problems += self.shortfalls.of_boundaries(boundaries, room)
        resident = self._resident_weights()
        read = resident < self.trace.weight_bytes  # layer by layer
        loads = 2.0 * self.trace.weight_bytes if read else 0.0
        activations = self.per_token * self.padded / max(len(segments) - 1, 1)
        memory = max(part.memory for part in parts) + (0.0 if self.machine.devices else activations)
        disk = self.gram_bytes + largest + boundaries + self._sample_bytes()
        problems += self.shortfalls.of_disk(disk, self.stored_itemsize)
        beside = resident if read and not self.machine.devices else 0.0  # weights that the budget has room for
        problems += self.shortfalls.of_memory(memory + beside)
        if not self.machine.loaded:
            problems += self.shortfalls.of_segments(self._weights_at_work(), activations)
        passes = streamed_flops(self.trace.blocks, every)
        flops = passes + forming_flops(self.trace.shapes, chosen, "dense")
        collect = self._collect(flops, total, memory, chosen, 1)
        collect = Stage(
            "collect",
            collect.flops,
            collect.read + boundaries + loads,
            collect.written + boundaries,
            memory,
            collect.seconds + boundaries / self.rates.write + (boundaries + loads) / self.rates.read,
        )
        return Strategy(
            name="stream layers",
            waves=len(segments),
            passes=passes / plain_flops(self.trace.blocks),
            gradients=float(total),
            disk=disk,
            weights=resident,
            stages=(collect, self._reduce(total, chosen), self._solve()),
            problems=tuple(dict.fromkeys(problems)),
            representation=chosen,
            boundaries=boundaries,
            every=every,
        )

    def _boundaries(self, edges: Sequence[float]) -> tuple[int, float]:
        """Return which boundaries are kept in the run's folder, and their bytes with the gradient that goes down."""
        if not edges:
            return 1, 0.0
        room = boundary_room(or_any(self.machine.disk))

        def size(every: int) -> float:
            return self.n * (sum(edges[::every]) + max(edges))

        every = next((every for every in range(1, len(edges)) if size(every) <= room), len(edges))
        return every, size(every)

    def _resident_weights(self) -> float:
        """Return the bytes of weights in memory: all where they fit, else those at work."""
        machine = self.machine
        room = machine.memory if not machine.devices else _SHARE * (machine.device_memory or 0) * machine.devices
        if machine.loaded or room is None or self.trace.weight_bytes <= room:
            return float(self.trace.weight_bytes)
        return self._weights_at_work()

    def _weights_at_work(self) -> float:
        """Return the bytes of the weights around the layers and of two layers."""
        blocks = self.trace.blocks
        layers = sorted(block.weight_bytes for block in blocks if block.is_layer)
        return float(sum(block.weight_bytes for block in blocks if not block.is_layer) + sum(layers[-2:]))

    def _collect(
        self,
        flops: float,
        size: float,
        memory: float,
        chosen: Mapping[str, Representation],
        waves: int,
        *,
        stored: bool = True,
    ) -> Stage:
        """Return the stage that takes gradients and writes them; `flops` of one sample, `size` in bytes."""
        guards = 0  # samples of the batches that the guard compares, in all waves
        if self.config.guard_every:
            guards = waves * -(-len(self.units) // self.config.guard_every) * self.batches[0]
        plain = plain_flops(self.trace.blocks) * (guards + PROBE_SAMPLES * _PROBE_PASSES)
        total = self.n * flops + plain
        chunks, arrays = self._pieces(chosen) if stored else (0, 0)
        norms = ((self.n if stored else 0) + guards / waves) * norm_flops(self.trace.shapes, chosen)
        sums = guards / waves * forming_flops(self.trace.shapes, chosen, "factors")
        dense = sum(shape.numel for shape in self.rows if chosen[shape.name] == "dense")
        compared = PROBE_SAMPLES * _PROBE_COMPARISONS * self.trace.n_params + guards / waves * dense
        seconds = total / self.rates.passes + size / self.rates.write + _FLOAT64 * norms / self.rates.forming
        seconds += sums / self.rates.forming + compared * self.rates.compare_seconds
        seconds += chunks * self.rates.chunk_seconds + arrays * self.rates.array_seconds
        return Stage("collect", total + norms + sums, 0.0, size, memory, seconds)

    def _pieces(self, chosen: Mapping[str, Representation]) -> tuple[int, int]:
        """Return the chunks of rows, and the arrays of factors: each tensor of each batch is one."""
        chunks = len(self.units) * 4
        keys = set()
        for shape in self.trace.shapes:
            if chosen[shape.name] == "dense":
                width = chunk_columns(shape.numel, self.n, self.config.chunk_size, self.stored_itemsize)
                chunks += len(self.units) * -(-shape.numel // width)
            else:
                keys |= {side.key for pair in shape.pairs for side in pair}
        return chunks, len(self.batches) * len(keys) + sum(held == "dense" for held in chosen.values())

    def _reduce(self, size: float, chosen: Mapping[str, Representation], *, stored: bool = True) -> Stage:
        """Return the stage that forms rows of factors where needed, and multiplies."""
        costs = [product_cost(shape, chosen[shape.name], self.n, self._single(shape)) for shape in self.trace.shapes]
        forming = sum(cost.forming for cost in costs)
        narrow = self.config.dtype_gram != torch.float64  # else the rate is that of float64 products already
        products = sum(
            cost.product * (_FLOAT64 if narrow and not self._single(shape) and cost.kernel == "slabs" else 1.0)
            for shape, cost in zip(self.trace.shapes, costs, strict=True)
        )
        chunks, arrays = self._pieces(chosen) if stored else (0, 0)
        seconds = forming / self.rates.forming + products / self.rates.products + size / self.rates.read
        seconds += (chunks + arrays) * self.rates.chunk_seconds + _OF_A_GRAM * self.n_grams * self.rates.array_seconds
        seconds += self.gram_bytes / self.rates.write
        return Stage("reduce", forming + products, size, self.gram_bytes, self._reduction_memory(chosen), seconds)

    def _single(self, shape: GradientShape) -> bool:
        """Return whether the products of a parameter's rows are formed in float32."""
        return self.config.dtype_gram != torch.float64 and self.row_itemsize == 4 and shape.numel >= WIDE

    def least(self) -> dict[str, float]:
        """Return the smallest budgets with which the run could be done in waves: one parameter in each, if need be."""
        sizes = self.sizes(self.held(self.config.representation))
        alone = [sizes.of([name]) for name in self.shapes]
        kept = [name for name in self.shapes if is_kept(name, self.config.keep_gradients or ())]
        disk = sizes.of(kept).disk + max((one.disk for one in alone if one.parameters[0] not in kept), default=0)
        memory = self.host_per_token * self.padded + max(one.memory for one in alone)
        return {
            "disk": disk + self.gram_bytes + self._sample_bytes(),
            "memory": max(memory, self._least_reduction(), float(dense_bytes(self.n, self.n))),
        }

    def _least_reduction(self) -> float:
        """Return the least bytes in which one worker can reduce."""
        return float(least_bytes(self.n))

    def _reduction_memory(self, chosen: Mapping[str, Representation]) -> float:
        """Return the bytes of all workers, which are fewer, or have smaller slabs, where the budget says so."""
        workers = self.config.n_workers or torch.get_num_threads()
        each = reduction_bytes(
            self.trace.shapes, chosen, self.n, self.config.chunk_size, self.row_itemsize, self.stored_itemsize
        )
        wanted = workers * each + DECODING_BYTES
        return min(wanted, max(or_any(self.machine.memory), self._least_reduction()))

    def _solve(self) -> Stage:
        blocks = len(set(assign_blocks(self.shapes, self.config.block_structure).values())) * self.structures
        flops = blocks * eigensolve_flops(self.n)
        seconds = flops / self.rates.solve + self.structures * self.gram_bytes / self.rates.read
        return Stage(
            "solve", flops, self.structures * self.gram_bytes, 0.0, float(dense_bytes(self.n, self.n)), seconds
        )

    def _sample_bytes(self) -> float:
        """Return the bytes of what is kept of each sample: loss, targets, validity, a norm for each parameter."""
        return self.n * (8.0 + 8.0 + 1.0 + 8.0 * len(self.shapes))
