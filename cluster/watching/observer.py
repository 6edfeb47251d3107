"""What watches a gateway: metrics, traces and the live page all hear the same few events.

Calls are made on the gateway's event loop, so an observer only counts; it never waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from engine.events import Timeline
    from engine.messages import Load, Migrated
    from engine.slo import Slo


SERVED = ("stop", "length")


@dataclass(frozen=True, slots=True)
class Opened:
    """A request has been accepted and sent along its first route."""

    request_id: str
    at_s: float
    prompt_tokens: int
    slo: Slo
    prefill: str
    decode: str | None
    """None where one instance does both phases."""
    timeline: Timeline
    """Goes on being filled in."""
    trace: str | None = None
    """The caller's W3C traceparent, if it sent one."""


@dataclass(frozen=True, slots=True)
class Rerouted:
    """A request goes on elsewhere because an instance lost it, or its target."""

    request_id: str
    at_s: float
    prefill: str
    decode: str | None
    outcome: str
    """replayed: prefilled again elsewhere; resumed: the former owner went on."""
    why: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The last thing a request does, whatever became of it."""

    request_id: str
    outcome: str
    """A FinishReason, or `refused` for one that was never sent anywhere."""
    timeline: Timeline
    prompt_tokens: int
    output_tokens: int
    slo: Slo
    kv_bytes: int = 0
    """Moved in its hand-off; 0 where there was none."""
    error: str | None = None
    """Name of the error's class."""
    cached_tokens: int = 0
    """Of the prompt, that a cached prefix spared."""

    @property
    def met_targets(self) -> bool:
        """A request that failed or was refused did not."""
        ttft_s = self.timeline.ttft_s
        if self.outcome not in SERVED or ttft_s is None:
            return False
        return self.slo.met_by(ttft_s, self.timeline.tpot_s(self.output_tokens))


class Observer(Protocol):
    def opened(self, event: Opened) -> None: ...

    def streamed(self, gaps_s: Sequence[float]) -> None:
        """Tokens of one step delivered: the time since each stream's token before."""
        ...

    def rerouted(self, event: Rerouted) -> None: ...

    def ended(self, event: Ended) -> None: ...

    def migrated(self, event: Migrated, at_s: float) -> None: ...

    def handoff_failed(self, request_id: str, reason: str, at_s: float) -> None:
        """`reason` is the name of the error's class."""
        ...

    def loaded(self, load: Load, at_s: float) -> None:
        """An instance's heartbeat."""
        ...

    def lost(self, instance: str, at_s: float) -> None: ...


class Observers:
    """Tells each of several observers; with none, observing costs a loop over nothing."""

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._streamed = tuple(observer.streamed for observer in self._observers)

    def opened(self, event: Opened) -> None:
        for observer in self._observers:
            observer.opened(event)

    def streamed(self, gaps_s: Sequence[float]) -> None:
        for streamed in self._streamed:
            streamed(gaps_s)

    def rerouted(self, event: Rerouted) -> None:
        for observer in self._observers:
            observer.rerouted(event)

    def ended(self, event: Ended) -> None:
        for observer in self._observers:
            observer.ended(event)

    def migrated(self, event: Migrated, at_s: float) -> None:
        for observer in self._observers:
            observer.migrated(event, at_s)

    def handoff_failed(self, request_id: str, reason: str, at_s: float) -> None:
        for observer in self._observers:
            observer.handoff_failed(request_id, reason, at_s)

    def loaded(self, load: Load, at_s: float) -> None:
        for observer in self._observers:
            observer.loaded(load, at_s)

    def lost(self, instance: str, at_s: float) -> None:
        for observer in self._observers:
            observer.lost(instance, at_s)
