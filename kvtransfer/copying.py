"""Scattered copies within one address space, with Python's lock released."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Protocol

import kvtransfer

if TYPE_CHECKING:
    from kvtransfer.plan import Copies

log = logging.getLogger(__name__)


class Copy(Protocol):
    def __call__(self, target_address: int, source_address: int, copies: Copies) -> None: ...


@cache
def copy_routine() -> Copy:
    """The native loop if it was built, else one `memmove` a piece; the log says which."""
    built = PathFinder.find_spec("kvtransfer._copy", kvtransfer.__path__)
    if built is None or built.origin is None:
        log.warning("copy routine chosen routine=memmove why=the native one was not built")
        return copy_by_memmove
    log.info("copy routine chosen routine=native")
    return native_copy(built.origin)


def native_copy(path: str) -> Copy:
    """The routine of native/copy.cpp, from the library at `path`."""
    routine = ctypes.CDLL(path).tandem_copy
    routine.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64]
    routine.restype = None

    def copy(target_address: int, source_address: int, copies: Copies) -> None:
        routine(
            target_address,
            source_address,
            copies.target_offsets.ctypes.data,
            copies.source_offsets.ctypes.data,
            copies.nbytes.ctypes.data,
            len(copies),
        )

    return copy


def copy_by_memmove(target_address: int, source_address: int, copies: Copies) -> None:
    """Takes Python's lock once a piece: slow beside busy threads."""
    for start, to, count in zip(
        (copies.source_offsets + source_address).tolist(),
        (copies.target_offsets + target_address).tolist(),
        copies.nbytes.tolist(),
        strict=True,
    ):
        ctypes.memmove(to, start, count)
