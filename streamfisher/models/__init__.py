"""Models: loaded, placed, called, and the per-sample losses of what they return."""
