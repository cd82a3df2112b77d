"""Where the gradients of a pass go: to disk, into memory, into a mean."""
