"""Memory that other processes of the host can map."""

from __future__ import annotations

import mmap
import os


def shared_file(nbytes: int) -> tuple[int, mmap.mmap]:
    """Zeroed memory that processes of this host can map through its descriptor.

    All its pages are there from the start: to find them during a copy takes longer than the copy.
    """
    fd = os.memfd_create("tandem-kv", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    return fd, mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
