"""Spectra in the run itself, as arrays with named dimensions and coordinates: for xarray alone."""

from __future__ import annotations

import os
from collections.abc import Sequence

from streamfisher.analysis.run import StoredRun
from streamfisher.results.frames import facts, named_arrays
from streamfisher.results.notebook import structure_name
from streamfisher.results.spectrum import Spectrum
from streamfisher.runtime.remote_path import RemotePath


def write_named_spectra(run: StoredRun, spectra: Sequence[Spectrum]) -> list[str]:
    """Write spectra of all samples into the run, as `spectra/layer` or `spectra/layer.centered`, and coordinates.

    Those of a choice of samples, weighted, or of an unfinished run are left out: a group is named after its blocks. A
    run that is only read, below a URL or on a disk that is read-only, gets none.

    Returns:
        The names of the groups.
    """
    written: list[str] = []
    if isinstance(run.path, RemotePath) or not os.access(run.path, os.W_OK):
        return written
    for spectrum in spectra:
        meta = spectrum.metadata
        if meta.get("samples") or meta.get("weights") or meta.get("partial"):
            continue
        name = structure_name(spectrum) + (".centered" if meta.get("centered") else "")
        run.store.named.write_spectrum(name, named_arrays(spectrum, union=False), facts(spectrum))
        written.append(name)
    if written:
        run.store.named.write_coordinates()
    return written
