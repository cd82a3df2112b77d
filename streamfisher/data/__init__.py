"""Samples: numbered, cut into units and batches, and read from files."""
