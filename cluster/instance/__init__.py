"""One instance of the model: its decider, the host that drives it, and its ranks."""
