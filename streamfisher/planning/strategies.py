"""The ways of doing a run, each with its bytes, passes, memory and time.

dense, one pass     every row on disk at once, as rows
one pass            every gradient on disk at once, rows or factors, whichever are smaller
waves               what the disk and memory budgets allow at a time, one pass for each
stream layers       boundaries of all samples are kept, and one layer after the other is replayed and reduced
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch

from streamfisher.blocks.structures import assign_blocks
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import make_units, padded_total
from streamfisher.errors import CapacityError, ConfigError
from streamfisher.gradients.activations import TEMPORARY
from streamfisher.gradients.projection import projected
from streamfisher.planning.costs import forming_flops, pass_flops, plain_flops, streamed_flops
from streamfisher.planning.machine import Machine, or_any
from streamfisher.planning.model_trace import ModelTrace
from streamfisher.planning.rates import Rates
from streamfisher.planning.representation import Representation, choose_representation, sample_bytes
from streamfisher.planning.run_layout import (
    ACTIVATION_SHARE,
    RunLayout,
    boundary_memory,
    boundary_room,
    fit_batches,
    layout_within,
    samples_of_batches,
)
from streamfisher.planning.shortfalls import Shortfalls
from streamfisher.planning.stages import StageCosts
from streamfisher.planning.strategy import BlockBytes, Stage, Strategy
from streamfisher.planning.waves import WaveSize, WaveSizes
from streamfisher.runtime.memory import DEVICE_MARGIN
from streamfisher.store.kept import is_kept
from streamfisher.stream.boundaries import boundary_spacing
from streamfisher.stream.settings import check_settings

#: Of devices, at most this share is for the activations of a batch, and for weights that stay there.
_SHARE = 0.5


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
        apart: Sequence[int] | None = None,
    ):
        self.trace, self.config, self.machine, self.rates = trace, config, machine, rates
        self.lengths, self.apart = list(lengths), apart
        self.n = len(lengths)
        self.rows = projected(trace.shapes, config.project)
        self.shapes = {shape.name: shape for shape in self.rows}
        self.row_dtype = functools.reduce(torch.promote_types, (s.dtype for s in trace.shapes), config.dtype_compute)
        self.store_dtype = config.dtype_store or self.row_dtype
        on_host = machine.devices == 0
        self.per_token = TEMPORARY * trace.activation_bytes / trace.tokens  # of activations
        self.host_per_token = self.per_token if on_host else 0.0
        self.batch_tokens = self._batch_tokens()
        self.batches = samples_of_batches(self.lengths, config.chunk_size, self.batch_tokens, apart)
        self.stages = StageCosts(trace, self.rows, config, machine, rates, self.batches, self.row_dtype, structures)
        self.n_grams, self.gram_bytes = self.stages.n_grams, self.stages.gram_bytes
        self.shortfalls = Shortfalls(machine, config, self.gram_bytes, trace.weight_bytes)

    def _batch_tokens(self) -> int:
        """Return the padded tokens of one backward pass: by the run's own rule, and on devices as many as fit."""
        longest = max(self.lengths)
        _, factors = sample_bytes(self.rows, self.held(self.config.representation), 1)
        try:
            memory = int(or_any(self.machine.memory))
            return fit_batches(self._for_devices(), self.lengths, self.host_per_token, factors, memory)
        except CapacityError:  # which the layout says again
            return longest

    def _for_devices(self) -> SpectralConfig:
        """Return the config with batches whose activations fit the devices, beside the weights."""
        machine = self.machine
        if machine.devices == 0 or machine.device_memory is None or self.per_token <= 0:
            return self.config
        free = max(machine.device_memory * machine.devices - self.trace.weight_bytes, 0) * _SHARE / machine.devices
        fits = max(max(self.lengths), int(free / self.per_token))
        return self.config.replace(batch_tokens=min(self.config.batch_tokens, fits))

    def _laid_out(self, *, streamed: bool, beside: float = 0.0) -> RunLayout:
        """Return how the run would lay itself out.

        Args:
            streamed: by layers.
            beside: bytes of weights that a stated memory budget has room for, too.

        Raises:
            CapacityError: the run would refuse.
            ConfigError: settings exclude one another.
        """
        segments = self.trace.segments()
        stated = self.config.memory_budget is not None
        return layout_within(
            self.rows,
            self.lengths,
            self._for_devices(),
            disk=int(or_any(self.machine.disk)),
            memory=int(or_any(self.machine.memory) - (beside if stated else 0)),
            device_memory=self._device_room(),
            row_dtype=self.row_dtype,
            activations=self.host_per_token / (max(len(segments) - 1, 1) if streamed else 1),
            segments=segments if streamed else None,
            apart=self.apart,
        )

    def _device_room(self) -> int | None:
        """Return the bytes that a run may take on a device beside the weights; `None`: there is none, or several."""
        machine = self.machine
        if machine.devices != 1 or machine.device_memory is None:
            return None
        if self.config.device_memory_budget is not None:
            return int(self.config.device_memory_budget)
        return int(DEVICE_MARGIN * max(machine.device_memory - self.trace.weight_bytes, 0))

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
            row_itemsize=self.row_dtype.itemsize,
            stored_itemsize=self.store_dtype.itemsize,
        )

    def held(self, representation: str) -> dict[str, Representation]:
        """Return how each parameter is held."""
        return choose_representation(
            self.rows,
            representation,
            row_itemsize=self.store_dtype.itemsize,
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
            rows = float(sum(shape.numel for shape in shapes) * self.store_dtype.itemsize)
            factors = math.fsum(sample_bytes(shapes, factored, self.store_dtype.itemsize))
            stored = math.fsum(sample_bytes(shapes, chosen, self.store_dtype.itemsize))
            n = self.n
            found.append(BlockBytes(key, sum(shape.numel for shape in shapes), n * rows, n * factors, n * stored))
        return tuple(found)

    def stored(self, name: str, representation: str, *, budgets: bool) -> Strategy:
        """Return a way that keeps gradients on disk: at once, or in waves where budgets are to be met."""
        chosen = self.held(representation)
        cut, hold = [self.sizes(chosen).of(list(self.shapes))], "disk"
        keep: Sequence[str] = self.config.keep_gradients or ()
        problems = self.stages.problems(chosen) + self.shortfalls.of_weights()
        hopeless = False
        if budgets:
            try:
                layout = self._laid_out(streamed=False)
                cut, hold, keep = layout.waves, layout.hold, layout.keep
            except CapacityError as error:
                problems.append(str(error))
                hopeless = True
        waves = [list(wave.parameters) for wave in cut]
        total = sum(wave.disk for wave in cut)
        largest = max(wave.disk for wave in cut)
        held, stored = _most_in_memory(cut, hold), hold == "disk"
        away, names_away = _away(cut)
        disk = self.gram_bytes + ((total if "*" in keep else largest) if stored else 0) + self.stages.sample_bytes()
        memory = float(max(wave.memory for wave in cut) + held)
        if not hopeless:  # else the numbers are those of a single wave, which nobody would try
            counted = self._counted(self.host_per_token * self.padded)
            problems += self.shortfalls.of_disk(disk, self.store_dtype.itemsize)
            problems += self.shortfalls.of_memory(memory + counted)
        memory += self.host_per_token * self.padded
        passes = sum(pass_flops(self.trace.blocks, wave) for wave in waves)
        flops = passes + forming_flops(self.trace.shapes, chosen, "dense")
        collect = self.stages.collect(flops, total, memory, chosen, len(waves), hold=hold, away=away)
        reduce = self.stages.reduce(total, chosen, hold=hold, away=names_away)
        at_risk = 0.0 if stored else (collect.seconds + reduce.seconds) / len(waves)
        return Strategy(
            name=name,
            waves=len(waves),
            passes=passes / plain_flops(self.trace.blocks),
            gradients=float(total) if stored else 0.0,
            disk=disk,
            weights=float(self.trace.weight_bytes),
            stages=(collect, reduce, self.stages.solve()),
            problems=tuple(dict.fromkeys(problems)),
            representation=chosen,
            hold=hold,
            away=away,
            at_risk=at_risk,
        )

    def streamed(self) -> Strategy:
        """Return the way that replays one layer at a time."""
        chosen = self.held(self.config.representation)
        sizes = self.sizes(chosen)
        segments = self.trace.segments()
        cut, hold = [sizes.of(names) for names in segments], "disk"
        edges = [block.boundary_bytes for block in self.trace.blocks if block.boundary_bytes]
        problems = self.stages.problems(chosen)
        if not edges:
            problems.append(f"{self.trace.name} is not a stack of layers that call one another: use waves.")
        resident = self._resident_weights()
        read = resident < self.trace.weight_bytes  # layer by layer
        loads = 2.0 * self.trace.weight_bytes if read else 0.0
        beside = resident if read and not self.machine.devices else 0.0  # weights that the budget has room for
        hopeless = False
        try:
            check_settings(self.config)
            layout = self._laid_out(streamed=True, beside=beside)
            cut, hold = layout.waves, layout.hold
        except (CapacityError, ConfigError) as error:
            problems.append(str(error))
            hopeless = True
        near = boundary_memory(or_any(self.machine.memory), {wave.hold or hold for wave in cut})
        every, boundaries = self._boundaries(edges, len(segments), near, problems)
        on_disk = max(boundaries - near, 0.0)
        total, largest = sum(part.disk for part in cut), max(part.disk for part in cut)
        held, stored = _most_in_memory(cut, hold), hold == "disk"
        away, names_away = _away(cut)
        activations = self.per_token * self.padded / max(len(segments) - 1, 1)
        on_host = 0.0 if self.machine.devices else activations
        memory = float(max(part.memory for part in cut) + held) + boundaries - on_disk
        disk = self.gram_bytes + (largest if stored else 0) + on_disk + self.stages.sample_bytes()
        if not hopeless:
            problems += self.shortfalls.of_disk(disk, self.store_dtype.itemsize)
            problems += self.shortfalls.of_memory(memory + beside + self._counted(on_host))
        memory += on_host
        if not self.machine.loaded:
            problems += self.shortfalls.of_segments(self._weights_at_work(), activations)
        passes = streamed_flops(self.trace.blocks, every, [wave.parameters for wave in cut])
        flops = passes + forming_flops(self.trace.shapes, chosen, "dense")
        collect = self.stages.collect(flops, total, memory, chosen, 1, hold=hold, away=away)
        collect = Stage(
            "collect",
            collect.flops,
            collect.read + on_disk + loads,
            collect.written + on_disk,
            memory,
            collect.seconds + on_disk / self.rates.write + (on_disk + loads) / self.rates.read,
        )
        reduce = self.stages.reduce(total, chosen, hold=hold, away=names_away)
        at_risk = 0.0 if stored else (collect.seconds + reduce.seconds) / len(cut)
        if not stored and near:  # boundaries in memory are made again, by a forward pass
            at_risk += collect.seconds * plain_flops(self.trace.blocks) / 3 / passes
        return Strategy(
            name="stream layers",
            waves=len(cut),
            passes=passes / plain_flops(self.trace.blocks),
            gradients=float(total) if stored else 0.0,
            disk=disk,
            weights=resident,
            stages=(collect, reduce, self.stages.solve()),
            problems=tuple(dict.fromkeys(problems)),
            representation=chosen,
            boundaries=boundaries,
            every=every,
            hold=hold,
            away=away,
            at_risk=at_risk,
        )

    def _counted(self, activations: float) -> float:
        """Return what of the activations a run counts: all within a stated budget; else they have the other half."""
        return activations if self.config.memory_budget is not None else 0.0

    def _boundaries(
        self, edges: Sequence[float], n_segments: int, memory: int, problems: list[str]
    ) -> tuple[int, float]:
        """Return which boundaries are kept, and their bytes with the gradient that goes down.

        Args:
            edges: bytes of each boundary, of a sample of the mean length.
            n_segments: how many segments there are.
            memory: bytes of the host's memory for them, before the run's folder is taken.
            problems: told where not even one fits.
        """
        if not edges:
            return 1, 0.0
        units = make_units(self.n, self.config.chunk_size)
        padded = padded_total(self.lengths, units, self.batch_tokens, self.apart)
        samples = padded / self.trace.tokens  # of the mean length
        try:
            room = boundary_room(or_any(self.machine.disk)) + memory
            every = boundary_spacing(room, int(samples * max(edges)), n_segments)
        except CapacityError as error:
            problems.append(str(error))
            every = len(edges)
        return every, samples * (sum(edges[::every]) + max(edges))

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

    def least(self) -> dict[str, float]:
        """Return the smallest budgets with which the run could be done in waves: one parameter in each, if need be."""
        sizes = self.sizes(self.held(self.config.representation))
        alone = [sizes.of([name]) for name in self.shapes]
        kept = [name for name in self.shapes if is_kept(name, self.config.keep_gradients or ())]
        disk = sizes.of(kept).disk + max((one.disk for one in alone if one.parameters[0] not in kept), default=0)
        activations = self.host_per_token * max(self.padded, max(self.lengths) / ACTIVATION_SHARE)
        memory = activations + max(one.memory for one in alone)
        return {
            "disk": disk + self.gram_bytes + self.stages.sample_bytes(),
            "memory": self.stages.least_memory(self.held(self.config.representation), memory),
        }


def _most_in_memory(waves: Sequence[WaveSize], hold: str) -> int:
    """Return the most bytes of gradients that are held in host memory at a time."""
    return max((wave.disk for wave in waves if (wave.hold or hold) == "host"), default=0)


def _away(waves: Sequence[WaveSize]) -> tuple[float, set[str]]:
    """Return bytes and parameters of the waves that are held in host memory where the others are on the device."""
    away = [wave for wave in waves if wave.hold == "host"]
    return float(sum(wave.disk for wave in away)), {name for wave in away for name in wave.parameters}
