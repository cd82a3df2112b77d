"""The arrays of a run: gradient rows, what was seen per sample, and Grams, each with its completion marker.

    RUN.zarr/
      manifest.json            what the run is made of
      gradients/<parameter>    (N, P_k)   rows, in the stored dtype
      packed/<pack>            (N, sum)   rows of small parameters, see `packs.py`
      factors/<wave>/...                  what rows are products of, see `factors.py`
      samples/loss             (N,)       float64
      samples/n_targets        (N,)       int64, target tokens
      samples/valid            (N,)       uint8, 0 where a sample was skipped
      samples/squared_norm     (N, K)     float64, per parameter
      fields/<name>            (N,)       float64, scalars that the data gives with every sample
      mean/<parameter>         (P_k,)     float64, only where rows are stored centered
      mean_parts/<parameter>   (units, P_k) float64 sums of the mean pass
      gram/<key>               (N, N)     float64, of the rows as stored; a key is a parameter, or a group of them
      gram_mean/<key>          (N + 1,)   float64, rows times the mean, and the mean's square (centered rows only)
      moment/<parameter>       (P_k + 1, P_k) float64, G^T G and, last, the sum of the rows, where P_k < N
      done/*.json              what is finished, with checksums

Nothing counts as written until its marker exists; a chunk that is missing reads as NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamfisher.data.batches import Unit
from streamfisher.errors import CorruptRunError
from streamfisher.runtime.durable import read_json, sweep_partials, write_json
from streamfisher.runtime.own_files import require_own_files
from streamfisher.runtime.paths import expanded
from streamfisher.store.factors import FactorStore
from streamfisher.store.folder import RunFolder
from streamfisher.store.grams import GramStore
from streamfisher.store.kept import KeptGradients
from streamfisher.store.layout import MANIFEST_COPY, create_run
from streamfisher.store.manifest import LARGEST_MANIFEST, Manifest
from streamfisher.store.markers import Markers, stage_of
from streamfisher.store.means import MeanStore
from streamfisher.store.moments import MomentStore
from streamfisher.store.named_arrays import NamedArrayStore
from streamfisher.store.row_writing import UnitWriting
from streamfisher.store.rows import RowStore
from streamfisher.store.samples import SampleStore
from streamfisher.store.spectra import SpectrumStore


@dataclass(frozen=True)
class UnitRecord:
    """What one unit of samples gave: everything that is written before its marker."""

    unit: Unit
    rows: Mapping[str, Tensor]  # name -> (len(unit), P_k) on the CPU, of parameters that are held as rows
    losses: np.ndarray  # (len(unit),) float64
    n_targets: np.ndarray  # (len(unit),) int64
    squared_norms: Mapping[str, np.ndarray]  # name -> (len(unit),) float64, of all parameters of the pass
    skipped: Mapping[int, str]  # sample number -> why its row is zero and does not count
    factors: Sequence[Mapping[str, Any]] = ()  # what `FactorWriting.entry` returned for each batch
    wave: int = 0
    written: UnitWriting | None = None  # the rows, where they are on the disk already


class RunStore:
    """An open run folder. Cheap to open and to pickle (workers open it again by its path).

    A run from elsewhere may hold links, FIFOs or devices: opening it refuses them, whatever they stand for.

    Its parts: `markers` (what is finished), `rows` and `factors` (gradients; `rows` gives back both, as the Gram stage
    reads them), `kept` (which of them stay), `samples` (values per sample), `means`, `grams`, `moments`, `spectra`
    (solved ones) and `named` (what other programs see).

    Args:
        path: of the folder, which may itself be a link.
        looked_over: it is known to hold files and folders only, as in a worker of a process that has opened it.

    Raises:
        RunError: the folder does not exist or is no run.
        CorruptRunError: its manifest is damaged or of another format version, or there is a link in it.
    """

    def __init__(self, path: str | Path, *, looked_over: bool = False):
        self.run = RunFolder(expanded(path))
        if not looked_over:
            require_own_files(self.run.path)
        self.markers = Markers(self.run)
        self.factors = FactorStore(self.run, self.markers)
        self.kept = KeptGradients(self.run, self.factors)
        self.samples = SampleStore(self.run, self.markers)
        self.means = MeanStore(self.run)
        self.rows = RowStore(self.run, self.markers, self.factors, self.kept, self.means)
        self.moments = MomentStore(self.run, self.means)
        self.grams = GramStore(self.run, self.moments)
        self.spectra = SpectrumStore(self.run, self.grams)
        self.named = NamedArrayStore(self.run)
        # What everybody asks a run for.
        self.path, self.manifest = self.run.path, self.run.manifest
        self.parameters, self.n_samples = self.run.parameters, self.run.n_samples
        self.chunk_rows, self.units, self.batch_tokens = self.run.chunk_rows, self.run.units, self.run.batch_tokens
        self.waves, self.keep, self.gram_members = self.run.waves, self.run.keep, self.run.gram_members
        self.unit_buffers = self.run.unit_buffers
        self.centered: bool = self.run.centered
        self.store_dtype: torch.dtype = self.run.store_dtype
        self.row_dtype: torch.dtype = self.run.row_dtype

    def __reduce__(self) -> tuple[Callable[..., RunStore], tuple[Path], dict[str, bool]]:
        return _opened_again, (self.path,), {"fsync": self.fsync}

    def __setstate__(self, state: Mapping[str, bool]) -> None:
        self.fsync = state["fsync"]

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> RunStore:
        """Lay out an empty run and open it.

        Raises:
            RunError: the folder exists and holds something that is not the remains of an unfinished creation.
        """
        create_run(Path(path), manifest)
        return cls(path)

    @property
    def fsync(self) -> bool:
        """Whether the filesystem is flushed before each marker."""
        return self.run.fsync

    @fsync.setter
    def fsync(self, value: bool) -> None:
        self.run.fsync = value

    def marking_together(self) -> AbstractContextManager[None]:
        """Let the markers that are written meanwhile become durable some at a time, see `RunFolder`."""
        return self.run.marking_together()

    def write_unit(self, record: UnitRecord) -> None:
        """Write everything of a unit in one wave, then its marker."""
        unit, wave = record.unit, record.wave
        where = slice(unit.start, unit.stop)
        written = record.written
        if written is None:
            written = self.rows.writing(unit, record.rows)
            for job, _ in written.jobs():
                job()
        valid = np.ones(len(unit), dtype=np.uint8)
        for sample in record.skipped:
            valid[sample - unit.start] = 0
        norms = np.full((len(unit), len(self.parameters)), np.nan)
        if len(self.waves) > 1:
            valid, norms = self.samples.of_other_waves(unit, wave, valid, norms)
        columns = {name: column for column, name in enumerate(self.parameters)}
        for name, values in record.squared_norms.items():
            norms[:, columns[name]] = values
        self.run.array("samples/loss")[where] = record.losses
        self.run.array("samples/n_targets")[where] = record.n_targets
        self.run.array("samples/valid")[where] = valid
        self.run.array("samples/squared_norm")[where] = norms
        content = {
            "start": unit.start,
            "stop": unit.stop,
            "wave": wave,
            "crc32c": written.checksums,
            "chunks": written.digests,
            "samples": self.samples.digests(
                wave, {"loss": record.losses, "n_targets": record.n_targets, "squared_norm": norms}
            ),
            **({"packs": written.pack_digests} if written.pack_digests else {}),
            "skipped": {str(sample): reason for sample, reason in record.skipped.items()},
        }
        if record.factors:
            content["factors"] = list(record.factors)
        self.factors.forget(unit, wave)
        self.run.mark(f"{stage_of(wave)}-{unit.index:06d}", content)

    def forget_unit(self, unit: Unit, wave: int | None = None) -> None:
        """Remove the markers of a unit, in one wave or in all, so that the next run computes it again."""
        for index in range(len(self.waves)) if wave is None else (wave,):
            self.markers.forget_unit(unit, index)
            self.factors.forget(unit, index)

    def sweep(self) -> int:
        """Delete what interrupted writes left behind and renew the manifest's copy; only while holding the lock."""
        copy = self.path / MANIFEST_COPY
        try:
            current = copy.is_file() and read_json(copy, LARGEST_MANIFEST) == self.manifest.to_dict()
        except CorruptRunError:
            current = False
        if not current:
            write_json(copy, self.manifest.to_dict())
        return sweep_partials(self.path)

    def bytes_on_disk(self) -> int:
        """Return the size of all files of the run."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())


def _opened_again(path: Path) -> RunStore:
    """Open a run in a worker."""
    return RunStore(path, looked_over=True)
