"""What a stored run is asked: spectra, bootstrap, growth, alignment, eigenvectors, comparison."""
