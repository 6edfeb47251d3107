"""Tells of each layer group once its KV is in the pool."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from engine.device_events import await_event, recorded
from engine.errors import InstanceLost

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engine.clock import Clock
    from engine.device_events import Event

Report = Callable[[int], None]


class LayerReports:
    """A CPU has finished a layer when its call returns; so here it is told at once."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = {layers[-1]: group for group, layers in enumerate(groups)}

    @contextmanager
    def telling(self, tell: Report | None) -> Iterator[Report]:
        """What to call at the end of each layer. When the context ends, the device has done all
        that it was asked for inside, and whoever listens has been told."""

        def report(layer: int) -> None:
            if tell is not None and layer in self._groups:
                tell(self._groups[layer])

        yield report

    @contextmanager
    def launching(self) -> Iterator[None]:
        """A pass that fails inside is over when the context ends; another may go on."""
        yield

    def reach(self, event: Event) -> None:
        """Returns once the device has come there."""
        event.synchronize()


class DeviceReports(LayerReports):
    """A GPU is told of layers long before it comes to them; another thread waits for it, so that
    the host goes on telling."""

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        event: Callable[[], Event] = recorded,
        *,
        wait_s: float,
        clock: Clock,
    ) -> None:
        super().__init__(groups)
        self._event, self._wait_s, self._clock = event, wait_s, clock
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="layer groups")

    @contextmanager
    def telling(self, tell: Report | None) -> Iterator[Report]:
        """Also when a pass fails halfway, its blocks are nobody's before the device is through."""
        told: list[Future[None]] = []

        def later(group: int) -> None:
            assert tell is not None
            told.append(self._waiting.submit(_tell_after, self._event(), tell, group))

        with (
            self._through_if_it_fails(told),
            super().telling(None if tell is None else later) as report,
        ):
            yield report
        self._settle(told)

    @contextmanager
    def launching(self) -> Iterator[None]:
        with self._through_if_it_fails([]):
            yield

    def reach(self, event: Event) -> None:
        with _of_use():
            await_event(event, self._wait_s, self._clock)

    @contextmanager
    def _through_if_it_fails(self, told: list[Future[None]]) -> Iterator[None]:
        try:
            yield
        except InstanceLost:
            raise  # whoever gave the device up does not wait for it
        except BaseException:
            self._settle(told)
            raise

    def _settle(self, told: list[Future[None]]) -> None:
        with _of_use():
            await_event(self._event(), self._wait_s, self._clock)
        for each in told:
            each.result()


@contextmanager
def _of_use() -> Iterator[None]:
    """Raises InstanceLost for a device that fails whatever it is asked, as for one that is late: no
    request is to blame for it then."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise InstanceLost(f"the device is of no use any more: {error}") from error


def _tell_after(event: Event, tell: Report, group: int) -> None:
    event.synchronize()
    tell(group)
