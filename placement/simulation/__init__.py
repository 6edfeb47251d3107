"""A deployment in virtual time, run by the schedulers and deciders that serve it."""
