"""Memory that one process fills with weights and others read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kvtransfer.cuda_memory import CudaMemory

if TYPE_CHECKING:
    from typing import Any


@dataclass(frozen=True, slots=True)
class Exported:
    """How another process finds a memory."""

    handle: bytes
    offset: int
    """Of its first byte in what the handle stands for."""
    nbytes: int


class SharedMemory(Protocol):
    """Gives out and maps uint8 tensors."""

    @property
    def identity(self) -> str:
        """Of the device: only processes on the same one can share."""
        ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Lasts as long as this object."""
        ...

    def export(self, memory: torch.Tensor) -> Exported:
        """Once all that was asked of the device has been written."""
        ...

    def open(self, exported: Exported) -> torch.Tensor: ...

    def close(self, memory: torch.Tensor) -> None:
        """Of what was opened, once nobody reads it any more."""
        ...


class _Mapped:
    """What torch makes a tensor of without a copy."""

    def __init__(self, start: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (start, False),
            "strides": None,
            "version": 3,
        }


class GpuMemory:
    """A GPU's, by CUDA IPC."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._driver = device, CudaMemory(str(device))
        self._given: list[torch.Tensor] = []
        self._starts: dict[int, int] = {}
        """What each opened memory lies in, by where it begins."""

    @property
    def identity(self) -> str:
        return self._driver.identity

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._given.append(torch.empty(nbytes, dtype=torch.uint8, device=self._device))
        return self._given[-1]

    def export(self, memory: torch.Tensor) -> Exported:
        torch.cuda.synchronize(self._device)
        handle, offset = self._driver.export(memory.data_ptr())
        return Exported(handle, offset, memory.numel())

    def open(self, exported: Exported) -> torch.Tensor:
        start = self._driver.open(exported.handle)
        mapped = _Mapped(start + exported.offset, exported.nbytes)
        memory = torch.as_tensor(mapped, device=self._device)
        assert memory.data_ptr() == start + exported.offset, "torch has made a copy"
        self._starts[memory.data_ptr()] = start
        return memory

    def close(self, memory: torch.Tensor) -> None:
        torch.cuda.synchronize(self._device)
        self._driver.close(self._starts.pop(memory.data_ptr()))
