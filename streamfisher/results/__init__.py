"""Frozen results: spectra, their metrics, and what is known of their errors."""
