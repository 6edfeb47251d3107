"""Where the tensors of weights lie: each as torch gives it, or all in one piece of memory.

Whoever asks a `OnePiece` for the same tensors in the same order finds them in the same places, so
that a process can load weights and others find them there.
"""

from __future__ import annotations

from hashlib import blake2b
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

META = torch.device("meta")
"""Where a model is built of shapes alone."""
ALIGNED_BYTES = 256


class Storage(Protocol):
    @property
    def filled(self) -> bool:
        """Whether what is given out holds the weights already."""
        ...

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...

    def check_alive(self) -> None:
        """Raises where what was given out may be gone: nothing computed from it counts."""
        ...


class OwnPieces:
    filled = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def check_alive(self) -> None: ...


class Measured(OwnPieces):
    """Shapes alone: what a `OnePiece` for them must hold, and a name for their order."""

    def __init__(self) -> None:
        super().__init__(META)
        self.nbytes = 0
        self._order = blake2b(digest_size=12)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.nbytes += room_bytes(shape, dtype)
        self._order.update(f"{shape}{dtype}".encode())
        return super().take(shape, dtype)

    @property
    def order(self) -> str:
        return self._order.hexdigest()


class OnePiece:
    def __init__(
        self, memory: torch.Tensor, check_alive: Callable[[], None], *, filled: bool
    ) -> None:
        """`memory` is uint8 and begins where any number may."""
        self.filled, self.check_alive = filled, check_alive
        self._memory, self._taken_bytes = memory, 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        start, nbytes = self._taken_bytes, prod(shape) * dtype.itemsize
        self._taken_bytes += room_bytes(shape, dtype)
        assert self._taken_bytes <= self._memory.numel(), (self._taken_bytes, shape)
        return self._memory[start : start + nbytes].view(dtype).view(shape)


def room_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-prod(shape) * dtype.itemsize // ALIGNED_BYTES) * ALIGNED_BYTES
