"""Finds the compiled CPU kernels and binds their C interface."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Protocol, cast

from engine.errors import Unsupported

log = logging.getLogger(__name__)

DIRECTORY = Path(__file__).parent
INTERFACE = 5
"""Of the records in engine/native/kernels.h; a library of another was built of other sources."""
BUILD = "python setup.py build_ext --inplace --force"
INSTALL = "pip install --force-reinstall --no-deps ."

Kernel = Callable[[bytes], None]
"""Takes a record of engine/native/kernels.h."""


class Kernels(Protocol):
    """What computes a step: the library, or what writes its calls down."""

    linear: Kernel
    norm: Kernel
    activation: Kernel
    place: Kernel
    attention: Kernel


class NativeLibrary:
    """The compiled kernels, and which instruction sets of this machine they can use."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._check_interface(path)
        self._library.tandem_set_name.restype = ctypes.c_char_p
        for name in ("set_name", "set_usable", "use_set", "set_threads"):
            getattr(self._library, f"tandem_{name}").argtypes = [ctypes.c_int64]
        for name in ("read_memory", "use_huge_pages", "collapse_pages"):
            getattr(self._library, f"tandem_{name}").argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._library.tandem_replay.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        self.pack = self._kernel("pack")
        self._library.tandem_unpack.argtypes = [ctypes.c_char_p]
        self._library.tandem_unpack.restype = ctypes.c_bool
        self.linear = self._kernel("linear")
        self.norm = self._kernel("norm")
        self.activation = self._kernel("activation")
        self.place = self._kernel("place")
        self.attention = self._kernel("attention")
        self.highest = self._kernel("highest")
        self._index_of = dict(self._usable())

    def _check_interface(self, path: Path) -> None:
        tell = getattr(self._library, "tandem_interface", None)
        found = None if tell is None else int(tell())
        if found != INTERFACE:
            built = "an interface without a number" if found is None else f"interface {found}"
            raise Unsupported(
                f"{path} has {built}, this engine has {INTERFACE}: "
                f"build it anew, in place with `{BUILD}`, or install anew with `{INSTALL}`"
            )

    def _kernel(self, name: str) -> Kernel:
        kernel = getattr(self._library, f"tandem_{name}")
        kernel.argtypes = [ctypes.c_char_p]
        kernel.restype = None
        return cast("Kernel", kernel)

    def _usable(self) -> list[tuple[str, int]]:
        found, index = [], 0
        while name := self._library.tandem_set_name(index):
            if self._library.tandem_set_usable(index):
                found.append((name.decode(), index))
            index += 1
        return found

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        """Best first."""
        return tuple(self._index_of)

    def read_memory(self, pointer: int, size_bytes: int) -> None:
        """Reads memory once on all threads, as fast as this machine can."""
        self._library.tandem_read_memory(pointer, size_bytes)

    def use_huge_pages(self, pointer: int, size_bytes: int) -> None:
        """Asks for large pages under memory that was not yet written."""
        self._library.tandem_use_huge_pages(pointer, size_bytes)

    def collapse_pages(self, pointer: int, size_bytes: int) -> None:
        """Moves memory that was written already to large pages, where the system can."""
        self._library.tandem_collapse_pages(pointer, size_bytes)

    def unpack(self, record: bytes) -> bool:
        """Finds rows of a packed weight; False where it has not all of them."""
        return bool(self._library.tandem_unpack(record))

    def replay(self, calls: bytes) -> None:
        """Calls kernels one after the other, as engine.replay wrote the calls down."""
        self._library.tandem_replay(calls, len(calls))

    def use(self, instruction_set: str, threads: int) -> None:
        self._library.tandem_use_set(self._index_of[instruction_set])
        self._library.tandem_set_threads(threads)


@cache
def load_library() -> NativeLibrary | None:
    """The kernels, or None where they were not built; those of other sources are refused."""
    paths = sorted(DIRECTORY.glob("_native*.so"))
    if not paths:
        log.warning("serving without native kernels reason=not built, for want of a C++ compiler")
        return None
    try:
        return NativeLibrary(paths[0])
    except OSError as error:
        log.warning("serving without native kernels reason=%s", error)
        return None
