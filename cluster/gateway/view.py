"""What a gateway knows of the cluster, and what it tells operators about its requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from placement.view import InstanceView, View

if TYPE_CHECKING:
    from cluster.gateway.answer import Choice
    from cluster.gateway.journal import Entry
    from engine.messages import Load


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """A request under way; `state` is waiting, prefilling, decoding or rerouting."""

    id: str
    state: str
    prefill: str
    decode: str
    epoch: int
    prompt_tokens: int
    output_tokens: int
    migrations: int


class Sightings:
    """The instances' latest loads and when they were heard."""

    def __init__(self) -> None:
        self._loads: dict[str, Load] = {}
        self._heard_s: dict[str, float] = {}
        self._view: View | None = None

    def heard(self, load: Load, now: float) -> None:
        self._loads[load.instance] = load
        self._heard_s[load.instance] = now
        self._view = None

    def lost(self, name: str) -> bool:
        """Whether the instance was known."""
        self._view = None
        self._heard_s.pop(name, None)
        return self._loads.pop(name, None) is not None

    def view(self, now: float) -> View:
        """The same object until somebody is heard or lost."""
        if self._view is None:
            ordered = sorted(self._loads.items())
            self._view = View(now, tuple(InstanceView(load) for _, load in ordered))
        return self._view

    def silent_since(self, limit_s: float) -> tuple[str, ...]:
        return tuple(name for name, at in self._heard_s.items() if at < limit_s)


def status_of(choice: Choice) -> RequestStatus:
    request, entry = choice.request, choice.entry
    if entry is None:
        return RequestStatus(request.id, "waiting", "", "", 0, len(request.prompt), 0, 0)
    return RequestStatus(
        request.id,
        _state(entry),
        choice.prefill,
        choice.decode,
        entry.epoch,
        len(request.prompt),
        choice.output_tokens,
        entry.migrations,
    )


def _state(entry: Entry) -> str:
    if entry.owner is None:
        return "rerouting"
    return "decoding" if entry.output else "prefilling"
