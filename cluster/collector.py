"""Python's garbage collector, kept off what a process has loaded to serve with."""

from __future__ import annotations

import gc


def spare_what_is_loaded() -> None:
    """Before the first request: each look through the modules and tables that stay would hold every
    stream up for tens of milliseconds, and find nothing."""
    gc.collect()
    gc.freeze()
