"""From Grams to eigenvalues: dense and iterative solvers, tiles, densities, and what is noise."""
