"""Memory that other processes map: where it begins, what it holds, and when it goes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from engine.shared_file import HUGE_PAGE_BYTES, shared_file

SIZES = [1, 4096, 5000, HUGE_PAGE_BYTES, 2 * HUGE_PAGE_BYTES + 5000]


def mapped_at(address: int) -> bool:
    """Whether a shared pool begins there in this process."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return any(line.startswith(f"{address:x}-") and "tandem-kv" in line for line in lines)


@pytest.mark.parametrize("nbytes", SIZES)
def test_it_is_zero_and_as_long_as_asked(nbytes: int) -> None:
    fd, memory = shared_file(nbytes)
    assert os.fstat(fd).st_size == nbytes
    assert not np.frombuffer(memory, np.uint8).any()
    assert memory.nbytes == nbytes
    os.close(fd)


@pytest.mark.parametrize("nbytes", SIZES)
def test_what_is_written_is_read_through_the_descriptor(nbytes: int) -> None:
    fd, memory = shared_file(nbytes)
    memory[nbytes - 1] = 7
    assert os.pread(fd, 2, nbytes - 1) == b"\x07"
    os.close(fd)


def test_it_begins_where_large_pages_do() -> None:
    fd, memory = shared_file(3 * HUGE_PAGE_BYTES)
    assert np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE_BYTES == 0
    os.close(fd)


def test_it_goes_with_the_last_view_of_it() -> None:
    fd, memory = shared_file(5000)
    os.close(fd)
    view = np.frombuffer(memory, np.uint8)[10:]
    address = view.ctypes.data - 10
    del memory
    assert mapped_at(address)
    del view
    assert not mapped_at(address)
