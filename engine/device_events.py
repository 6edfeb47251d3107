"""Places in a device's work, and waiting within bounds until it has come to them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

import torch

from engine.errors import InstanceLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.clock import Clock

LOOK_S = 50e-6
"""Between two looks: they keep Python's lock, and the event loop wants it, too."""
NEVER = threading.Event()


class Event(Protocol):
    """torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether the device has come to it."""
        ...

    def synchronize(self) -> None:
        """Returns once the device has come to it."""
        ...


class Past:
    """What has happened already."""

    def wait(self) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


def recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def reached_by(device: torch.device) -> Event:
    """The end of what a device was asked for so far: a CPU has done it."""
    return recorded() if device.type == "cuda" else Past()


def await_event(
    event: Event, wait_s: float, clock: Clock, pause: Callable[[float], object] = NEVER.wait
) -> None:
    """Looks again and again; raises InstanceLost if the device is late."""
    end_s = clock.now() + wait_s
    while not event.query():
        if clock.now() > end_s:
            raise InstanceLost(f"the device is not through after {wait_s} s")
        pause(LOOK_S)
