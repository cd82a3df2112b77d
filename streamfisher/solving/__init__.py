"""From Grams to eigenvalues: dense and iterative solvers, tiles, densities, and what is noise."""

from streamfisher.solving.blocksolver import block_spectrum
from streamfisher.solving.centering import center, uncenter
from streamfisher.solving.density import quadrature, spectral_density
from streamfisher.solving.lanczos import DenseOperator, Leading, SymmetricOperator, leading
from streamfisher.solving.selection import Selection, select
from streamfisher.solving.solve import Eigenproblem, RowPrecision, solve_blocks
from streamfisher.solving.tiled_gram import TILE, TiledGram
from streamfisher.solving.tiled_solve import solve_tiled

__all__ = [
    # Samples, weights, mean
    "Selection",
    "select",
    "center",
    "uncenter",
    # One eigenproblem, in memory or by tiles
    "Eigenproblem",
    "RowPrecision",
    "solve_blocks",
    "solve_tiled",
    "block_spectrum",
    # Operators and what is asked of them
    "SymmetricOperator",
    "DenseOperator",
    "leading",
    "Leading",
    "TiledGram",
    "TILE",
    "spectral_density",
    "quadrature",
]
