"""Weights that processes share in the host's memory, where a GPU's would be, and who keeps them."""

from __future__ import annotations

import mmap
import os
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch

from cluster.instance.weight_keeper import Keeper, Wanted, listen, load
from cluster.instance.weight_memory import Exported
from engine.ops import TorchOps
from engine.shared_file import shared_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

WAIT_S = 300.0


class HostMemory:
    identity = "the host"

    def __init__(self) -> None:
        self._given: dict[int, tuple[int, torch.Tensor]] = {}
        self.opened = 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        fd, memory = shared_file(nbytes)
        given = torch.frombuffer(memory, dtype=torch.uint8)
        self._given[given.data_ptr()] = fd, given
        return given

    def export(self, memory: torch.Tensor) -> Exported:
        fd, _ = self._given[memory.data_ptr()]
        return Exported(f"/proc/{os.getpid()}/fd/{fd}".encode(), 0, memory.numel())

    def open(self, exported: Exported) -> torch.Tensor:
        fd = os.open(exported.handle, os.O_RDWR)
        mapped = mmap.mmap(fd, exported.nbytes)
        os.close(fd)
        self.opened += 1
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def close(self, memory: torch.Tensor) -> None:
        del memory
        self.opened -= 1


def keep(wanted: Wanted, listening: Connection) -> None:
    listener = listen(wanted.name)
    listening.send(listener is not None)
    if listener is not None:
        Keeper(listener, partial(load, wanted, HostMemory(), TorchOps())).run()


class Starter:
    """Starts processes as `start_keeper` does, and remembers them."""

    def __init__(self, work: Callable[[Wanted, Connection], None]) -> None:
        self._work = work
        self.processes: list[BaseProcess] = []

    def __call__(self, wanted: Wanted) -> None:
        context = get_context("spawn")
        here, there = context.Pipe()
        self.processes.append(context.Process(target=self._work, args=(wanted, there), daemon=True))
        self.processes[-1].start()
        assert here.poll(WAIT_S)
        here.recv()


@contextmanager
def starting(work: Callable[[Wanted, Connection], None] = keep) -> Iterator[Starter]:
    starter = Starter(work)
    yield starter
    for process in starter.processes:
        process.kill()
        process.join(WAIT_S)
