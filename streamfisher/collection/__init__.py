"""Collecting a run: who computes what, in which order, and where it stopped."""
