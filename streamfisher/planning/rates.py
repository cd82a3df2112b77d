"""How fast a machine is at what a spectrum is made of: measured in a few seconds, or given."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from streamfisher.config import Codec
from streamfisher.errors import StreamfisherError, first_line
from streamfisher.gradients.factors import FactorPair, pack
from streamfisher.gradients.norms import norm
from streamfisher.planning.model_trace import LayerCall
from streamfisher.reduction.products import panel_sum
from streamfisher.runtime.threads import write_threads
from streamfisher.store import codecs
from streamfisher.store.chunks import ChunkWriter
from streamfisher.store.factor_writing import FactorWriting, write_factors
from streamfisher.store.factors import segments_of
from streamfisher.store.layout import PANEL

#: A layer with more bytes of weights is not built for a measurement; one linear layer of its width stands for it.
_LARGEST_LAYER = 1 << 30
_SECONDS = 1.0  # of one measurement, at most, beyond its first repetition


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second."""

    passes: float  # forward and backward passes, operations/s
    products: float  # products of slabs, operations/s of a symmetric product of N^2 P
    forming: float  # rows formed of factors, operations/s
    solve: float  # float64 eigensolve, operations/s of (4/3) N^3
    write: float  # gradients encoded, checked and written, bytes/s
    read: float  # and read back
    chunk_seconds: float = 0.0  # beside its bytes, for each chunk that is written or read
    array_seconds: float = 0.0  # for each small array that is made or opened
    compare_seconds: float = 0.0  # for each number of a gradient that is compared in float64
    transfer: float | None = None  # bytes/s between a device and the host
    host_products: float | None = None  # products on the host, where `products` are those of a device
    host_forming: float | None = None
    source: str = "given"  # 'given', or how it was measured

    def on_host(self) -> Rates:
        """Return these rates with those of the host for what gradients in its memory, or on its disk, take."""
        return dataclasses.replace(
            self, products=self.host_products or self.products, forming=self.host_forming or self.forming
        )

    def given(self, **rates: float | None) -> Rates:
        """Return these rates with those that are not `None` replaced."""
        known = {name: value for name, value in rates.items() if value is not None}
        if not known:
            return self
        names = ", ".join(known)
        return dataclasses.replace(self, **known, source=f"{self.source}; given: {names}")


#: Where nobody asked how fast anything is: every time is zero and is not shown.
UNKNOWN = Rates(*(math.inf,) * 6, source="not measured")


def measure(
    n_samples: int,
    *,
    dtype_gram: torch.dtype = torch.float32,
    codec: Codec = "raw",
    dtype_store: torch.dtype = torch.float32,
    layer: LayerCall | None = None,
    folder: Path | None = None,
) -> Rates:
    """Measure this machine, in about five seconds.

    Args:
        n_samples: N, up to which products and solves are measured at their own size.
        dtype_gram: of slab products.
        codec: of stored rows.
        dtype_store: of stored rows.
        layer: one layer of the model with the shapes it is called with; `None` means a linear layer.
        folder: on the disk that is meant; `None` means the one for temporary files.
    """
    cores = len(os.sched_getaffinity(0))
    write, read, chunk, array = _store_rates(codec, dtype_store, folder)
    passes, how = _pass_rate(layer)
    return Rates(
        passes=passes,
        products=_product_rate(min(n_samples, 1024), dtype_gram),
        forming=_forming_rate(),
        solve=_solve_rate(min(n_samples, 1000)),
        write=write,
        read=read,
        compare_seconds=_compare_seconds(),
        chunk_seconds=chunk,
        array_seconds=array,
        source=f"measured here ({cores} cores; passes: {how})",
    )


def product_rates(n_samples: int, dtype_gram: torch.dtype) -> dict[str, float]:
    """Return how fast this host forms rows and their products: what is held beside a device is reduced there."""
    return {"host_products": _product_rate(min(n_samples, 1024), dtype_gram), "host_forming": _forming_rate()}


def _seconds(work: Callable[[], Any], least: int = 2) -> float:
    """Return the best time of a few repetitions; the first one warms up."""
    work()
    times: list[float] = []
    while len(times) < least or (sum(times) < _SECONDS / 2 and len(times) < 20):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
        if sum(times) > _SECONDS:
            break
    return float(np.median(times))


def _product_rate(n_samples: int, dtype: torch.dtype) -> float:
    """Return the rate at which panels are multiplied and added up as the reduction does."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    panel = np.random.Generator(np.random.PCG64(0)).standard_normal((n_samples, PANEL)).astype(kind)
    total = panel_sum(n_samples, 0, "cpu")
    return n_samples**2 * PANEL / _seconds(lambda: total.add(panel))


def _forming_rate() -> float:
    """Return the rate of products of factors, (256, 64) by (64, 1024) for each of 16 samples, in float32."""
    left = np.ones((16, 256, 64), dtype=np.float32)
    right = np.ones((16, 64, 1024), dtype=np.float32)
    return 2.0 * 16 * 256 * 64 * 1024 / _seconds(lambda: left @ right)


def _compare_seconds() -> float:
    """Return what the probe and the guard take for each number of a gradient that they compare with another."""
    one, other = torch.ones(1 << 22), torch.zeros(1 << 22)
    return _seconds(lambda: norm(one, other)) / one.numel()


def _solve_rate(n_samples: int) -> float:
    size = max(n_samples, 64)
    rows = np.random.Generator(np.random.PCG64(1)).standard_normal((size, size))
    gram = rows @ rows.T
    return 4.0 / 3.0 * size**3 / _seconds(lambda: np.linalg.eigvalsh(gram), least=1)


def _store_rates(codec: Codec, dtype: torch.dtype, folder: Path | None) -> tuple[float, float, float, float]:
    """Return bytes/s written by all threads and read by one, seconds for each chunk, and for each small array.

    A batch's factors are taken into fresh memory, packed, written and read as those of a run are: what lies in a cache,
    or in memory that was used before, is several times as fast.
    """
    with (
        tempfile.TemporaryDirectory(dir=folder) as name,
        ThreadPoolExecutor(write_threads()) as threads,
    ):
        few = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        writer, turns = ChunkWriter((32, 16), dtype, codec), itertools.count()
        chunk = _seconds(lambda: writer.write(Path(name) / "one", (next(turns), 0), codecs.encode(few, dtype)))
        little = pack({"one": [FactorPair(few[None], few[None].clone())]})
        array = _seconds(lambda: write_factors(Path(name) / "small", next(turns), 0, 0, little, codec)) / 2

        batches = [_factors(dtype, seed) for seed in range(3)]
        sides = [side for pairs in batches[0].values() for pair in pairs for side in (pair.left, pair.right)]
        size = sum(side.nbytes for side in sides)
        entries: list[dict[str, Any]] = []

        def write() -> None:
            batch = batches[len(entries) % len(batches)]
            taken = {key: [FactorPair(pair.left.clone(), pair.right.clone()) for pair in batch[key]] for key in batch}
            writing = FactorWriting(Path(name) / "factors", len(entries), 0, 0, pack(taken), codec)
            list(threads.map(lambda part: part[0](), writing.jobs()))
            entries.append(writing.entry())

        written = _seconds(write)
        read_turns = itertools.cycle(range(len(entries)))

        def read() -> None:
            turn = next(read_turns)
            for key in batches[0]:
                for segment in segments_of(Path(name) / "factors", key, turn, [entries[turn]]):
                    segment.left.read()
                    segment.right.read()

        taken = _seconds(read)
    return size / max(written, 1e-9), size / max(taken, 1e-9), chunk, array


def _factors(dtype: torch.dtype, seed: int) -> dict[str, list[FactorPair]]:
    """Return the factors of four layers of width 1,024, 32 samples of 64 positions: 64 MB in float32."""
    generator = torch.Generator().manual_seed(seed)

    def side() -> torch.Tensor:
        return torch.randn(32, 64, 1024, generator=generator).to(dtype)

    return {f"layer{i}": [FactorPair(side(), side())] for i in range(4)}


def _pass_rate(layer: LayerCall | None) -> tuple[float, str]:
    """Return the rate of forward and backward with frozen parameters, and what it was measured on."""
    if layer is not None and layer.weight_bytes <= _LARGEST_LAYER:
        try:
            return _layer_rate(layer), f"forward and backward of {layer.name}"
        except (RuntimeError, TypeError, ValueError, IndexError, StreamfisherError) as error:
            reason = f"{layer.name} cannot be called alone: {first_line(error)[:80]}"
    else:
        reason = "no layer of a size to be measured"
    dtype = layer.dtype if layer is not None else torch.float32
    width, rows = 2048, 512
    linear = nn.Linear(width, width, bias=False, dtype=dtype).requires_grad_(False)
    x = torch.randn(rows, width).to(dtype).requires_grad_()

    def work() -> None:
        torch.autograd.grad(linear(x).sum(), x)

    return 4.0 * rows * width**2 / _seconds(work), f"a linear layer of width {width}; {reason}"


def _layer_rate(layer: LayerCall) -> float:
    """Run one layer, with random weights, on random inputs of the shapes it is called with."""
    module = layer.build()
    leaves, spec = pytree.tree_flatten((layer.args, layer.kwargs))
    generator = torch.Generator().manual_seed(0)

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        shape = list(leaf.shape)
        if leaf.dim() > 1 and shape[0] == 1:
            shape[0] = layer.batch
        if leaf.is_floating_point():
            return torch.randn(shape, generator=generator).to(leaf.dtype).requires_grad_()
        return torch.ones(shape, dtype=leaf.dtype)

    args, kwargs = pytree.tree_unflatten([real(leaf) for leaf in leaves], spec)

    def work() -> None:
        output = module(*args, **kwargs)
        hidden = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))
        hidden.float().sum().backward()

    return 2.0 * layer.forward_flops * layer.batch / _seconds(work)
