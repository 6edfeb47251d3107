"""Memory that other processes of the host can map."""

from __future__ import annotations

import ctypes
import mmap
import os
from weakref import finalize

import numpy as np

HUGE_PAGE_BYTES = 2 << 20
MAP_FIXED, MADV_COLLAPSE = 0x10, 25
"""Linux's; Python names neither."""
NO_MEMORY = ctypes.c_void_p(-1).value


def shared_file(nbytes: int) -> tuple[int, memoryview]:
    """Zeroed memory that processes of this host can map through its descriptor.

    All its pages are there from the start: to find them during a copy takes longer than the copy.
    They are large where the system agrees, since reads that jump between small ones wait for
    addresses. It is unmapped once nobody holds it.
    """
    fd = os.memfd_create("tandem-kv", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    libc = _libc()
    address = _map_aligned(libc, fd, nbytes)
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    finalize(memory, libc.munmap, address, nbytes).atexit = False
    view = memoryview(memory).cast("B")
    pages = np.frombuffer(view, np.uint8)
    pages[::HUGE_PAGE_BYTES] = 0
    libc.madvise(address, nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, MADV_COLLAPSE)
    pages[:: mmap.PAGESIZE] = 0
    return fd, view


def _map_aligned(libc: ctypes.CDLL, fd: int, nbytes: int) -> int:
    """Only an address that large pages begin at can be backed by them."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    room = _map(libc, None, nbytes + HUGE_PAGE_BYTES, protection=0, flags=private)
    start = -(-room // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    pages_end = -(-(start + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    if start > room:
        libc.munmap(room, start - room)
    if (rest := room + nbytes + HUGE_PAGE_BYTES - pages_end) > 0:
        libc.munmap(pages_end, rest)
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_SHARED | MAP_FIXED
    return _map(libc, start, nbytes, protection=writable, flags=flags, fd=fd)


def _map(
    libc: ctypes.CDLL, at: int | None, nbytes: int, *, protection: int, flags: int, fd: int = -1
) -> int:
    address: int = libc.mmap(at, nbytes, protection, flags, fd, 0)
    if address == NO_MEMORY:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {nbytes} bytes: {os.strerror(number)}")
    return address


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, whole = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [pointer, size, whole, whole, whole, ctypes.c_long]
    libc.mmap.restype = pointer
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, whole]
    return libc
