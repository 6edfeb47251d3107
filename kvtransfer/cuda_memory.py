"""Memory of a GPU that processes map from one another, through CUDA's driver."""

from __future__ import annotations

import ctypes
from typing import Any

from engine.errors import TransportError, Unsupported

HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


class CudaMemory:
    """The driver keeps what was opened where it is until it is closed, or the process ends."""

    def __init__(self, device: str) -> None:
        import torch

        try:
            self._driver: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Unsupported(f"cuda_ipc: {error}") from error
        self._device = torch.device(device)

    @property
    def identity(self) -> str:
        """The same in every process that sees this GPU, whatever number it has there."""
        return gpu_identity(str(self._device))

    def export(self, address: int) -> tuple[bytes, int]:
        """A handle of the memory that holds an address, and the address's place in it."""
        start, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        self._call(
            "cuMemGetAddressRange_v2",
            ctypes.byref(start),
            ctypes.byref(size),
            ctypes.c_uint64(address),
        )
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), start)
        return bytes(handle), address - start.value

    def open(self, handle: bytes) -> int:
        """Maps another process's memory; where it begins here."""
        start, given = ctypes.c_uint64(), _Handle.from_buffer_copy(handle)
        flags = ctypes.c_uint(LAZY_PEER_ACCESS)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(start), given, flags)
        return start.value

    def close(self, start: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(start))

    def _call(self, name: str, *arguments: Any) -> None:
        import torch

        with torch.cuda.device(self._device):
            torch.cuda.mem_get_info()  # gives a thread that is new to CUDA this device's context
            code = getattr(self._driver, name)(*arguments)
        if code:
            raise TransportError(f"cuda_ipc: {name} fails with CUDA error {code}")


def gpu_identity(device: str) -> str:
    """A GPU's own name: processes may each number theirs from 0."""
    import torch

    return f"cuda:{torch.cuda.get_device_properties(device).uuid}"
