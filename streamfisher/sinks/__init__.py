"""Where the gradients of a pass go."""
