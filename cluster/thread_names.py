"""Names of threads, as `top -H` and /proc show them: what a processor's time went to."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

PASSES = "tandem-pass"
LOOP = "tandem-loop"
"""What hands an instance its passes."""


def name_thread(name: str) -> None:
    """The calling one, and those that it starts from now on; nothing where there is no /proc."""
    with suppress(FileNotFoundError):
        Path("/proc/thread-self/comm").write_text(name, encoding="ascii")
