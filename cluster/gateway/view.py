"""What a gateway knows of the cluster, and what it tells operators about its requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.blocks import blocks_for
from engine.errors import PromptTooLong
from placement.view import InstanceView, View

if TYPE_CHECKING:
    from cluster.gateway.answer import Choice
    from cluster.gateway.entry import Entry
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
        self._gone: set[str] = set()
        self._nodes: dict[str, str] = {}
        self._view: View | None = None
        self._least_tokens = 0
        """What the smallest pool of the view holds."""

    def heard(self, load: Load, now: float) -> bool:
        """False for what an instance said before its end, and is read after it."""
        if load.instance in self._gone:
            return False
        self._loads[load.instance] = load
        self._heard_s[load.instance] = now
        self._view = None
        return True

    def joined(self, name: str, node: str) -> None:
        """Another instance may bear the name of one that is gone."""
        self._gone.discard(name)
        self._nodes[name] = node
        self._view = None

    def lost(self, name: str) -> bool:
        """Whether the instance was known."""
        self._view = None
        self._gone.add(name)
        self._heard_s.pop(name, None)
        self._nodes.pop(name, None)
        return self._loads.pop(name, None) is not None

    def view(self, now: float) -> View:
        """The same object until somebody is heard or lost."""
        if self._view is None:
            ordered = sorted(self._loads.items())
            seen = [InstanceView(load, self._nodes.get(name, "")) for name, load in ordered]
            self._view = View(now, tuple(seen))
            sizes = (load.total_blocks * load.block_tokens for load in self._loads.values())
            self._least_tokens = min(sizes, default=0)
        return self._view

    def too_small(self, tokens: int, now: float) -> tuple[str, ...]:
        """Instances whose whole pool could not hold a sequence of so many tokens."""
        loads = [one.load for one in self.view(now).instances]
        if tokens <= self._least_tokens:
            return ()
        return tuple(load.instance for load in loads if _wanted(tokens, load) > load.total_blocks)

    def check_prompt(self, prompt_tokens: int, now: float) -> None:
        """Raises PromptTooLong if no instance could hold it and its first token."""
        small = self.too_small(prompt_tokens + 1, now)
        if small and len(small) == len(self._loads):
            largest = max(self._loads.values(), key=lambda load: load.total_blocks)
            wanted = _wanted(prompt_tokens + 1, largest)
            raise PromptTooLong(prompt_tokens, wanted, largest.total_blocks)

    def lists(self, request_id: str) -> bool:
        """Whether an instance said that it holds this request."""
        loads = self._loads.values()
        return any(one.request_id == request_id for load in loads for one in load.sequences)

    def silent_since(self, limit_s: float) -> tuple[str, ...]:
        return tuple(name for name, at in self._heard_s.items() if at < limit_s)


def _wanted(tokens: int, load: Load) -> int:
    return blocks_for(tokens, load.block_tokens)


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
