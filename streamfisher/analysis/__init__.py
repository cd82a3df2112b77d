"""What a stored run is asked: spectra, bootstrap, growth, alignment, eigenvectors, comparison."""

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.compare import subspace_overlap
from streamfisher.analysis.eigenvectors import compute_eigenvectors, leading_coefficients
from streamfisher.analysis.run import StoredRun

__all__ = [
    # A run, looked at
    "StoredRun",
    "BlockGrams",
    # Eigenvectors in parameter space
    "compute_eigenvectors",
    "leading_coefficients",
    # Two runs
    "subspace_overlap",
]
