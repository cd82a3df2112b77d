"""From stored gradients to Grams: rows, factors, tiles; whole or a wave at a time; in bounded memory."""
