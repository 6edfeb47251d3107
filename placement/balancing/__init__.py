"""Which running requests move, and where."""
