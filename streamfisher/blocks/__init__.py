"""Which parameters belong together: block structures, and the keys under which their Grams are stored."""
