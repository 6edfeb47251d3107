"""What one gateway contributes to the live page: the last minutes, and no prompt ever."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from cluster.watching.history import History
from cluster.watching.others import new_life
from cluster.watching.tracing import phases, phases_so_far

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.watching.observer import Ended, Opened, Rerouted
    from engine.events import Timeline
    from engine.messages import Load, Migrated
    from engine.request import Request
    from engine.slo import Slo

MOST_REQUESTS = 10_000
SHOWN_REQUESTS = 60
SHOWN_ENDED = 40
SHOWN_MOVES = 60
SHOWN_HANDOFFS = 20
"""Every request has one: they must not drive the rarer moves out."""


@dataclass(slots=True)
class Tracked:
    """A request on its way through the cluster."""

    id: str
    timeline: Timeline
    prompt_tokens: int
    slo: Slo
    at: str
    decode: str | None
    output_tokens: int = 0
    moves: list[dict[str, Any]] = field(default_factory=list)


class Live:
    """An observer; `share` is what it contributes to the page's one document."""

    def __init__(self) -> None:
        self.life = new_life()
        self._loads: dict[str, Load] = {}
        self._requests: OrderedDict[str, Tracked] = OrderedDict()
        self._ended: deque[tuple[Ended, Tracked | None]] = deque(maxlen=SHOWN_ENDED)
        self._moves: deque[dict[str, Any]] = deque(maxlen=SHOWN_MOVES)
        self._handoffs: deque[dict[str, Any]] = deque(maxlen=SHOWN_HANDOFFS)
        self._numbers = count(1)
        self._history = History()
        self._now_s = 0.0
        self._streamed = 0
        """Tokens since then."""
        self._totals = {"requests": 0, "failed": 0, "migrations": 0, "failovers": 0}

    # What is observed.

    def opened(self, event: Opened) -> None:
        self._advance(event.at_s)
        self._requests[event.request_id] = Tracked(
            event.request_id,
            event.timeline,
            event.prompt_tokens,
            event.slo,
            event.prefill,
            event.decode,
        )
        if len(self._requests) > MOST_REQUESTS:
            self._requests.popitem(last=False)

    def streamed(self, gaps_s: Sequence[float]) -> None:
        self._streamed += len(gaps_s)

    def loaded(self, load: Load, at_s: float) -> None:
        self._advance(at_s)
        self._loads[load.instance] = load
        for running in load.sequences:
            one = self._requests.get(running.request_id)
            if one is None:
                continue
            one.output_tokens = max(one.output_tokens, running.output_tokens)
            if one.decode == load.instance and one.at != load.instance:
                self._move("handoff", one, one.at, load.instance, at_s)

    def lost(self, instance: str, at_s: float) -> None:
        self._advance(at_s)
        self._loads.pop(instance, None)

    def rerouted(self, event: Rerouted) -> None:
        self._totals["failovers"] += 1
        one = self._requests.get(event.request_id)
        if one is not None:
            one.decode = event.decode
            about = {"outcome": event.outcome, "why": event.why}
            self._move("failover", one, one.at, event.prefill, event.at_s, **about)

    def migrated(self, event: Migrated, at_s: float) -> None:
        self._totals["migrations"] += event.outcome == "committed"
        one = self._requests.get(event.request_id)
        if one is None:
            return
        about = {"outcome": event.outcome, "why": event.reason, "pause_s": event.pause_s}
        self._move("migration", one, event.source, event.target, at_s, **about)
        if event.outcome == "committed":
            one.decode = event.target
        else:
            one.at = event.source

    def handoff_failed(self, request_id: str, reason: str, at_s: float) -> None:
        one = self._requests.get(request_id)
        if one is not None:
            target = one.decode or one.at
            self._move("handoff", one, one.at, target, at_s, outcome=reason)

    def ended(self, event: Ended) -> None:
        now = event.timeline.finished_s or event.timeline.arrived_s
        self._advance(max(self._now_s, now))
        one = self._requests.pop(event.request_id, None)
        self._history.step(self._now_s).add(event)
        self._totals["requests"] += 1
        self._totals["failed"] += event.outcome in ("error", "refused")
        self._ended.appendleft((event, one))

    def _advance(self, now: float) -> None:
        if self._streamed:
            self._history.step(self._now_s).tokens += self._streamed
            self._streamed = 0
        self._now_s = now

    def _move(
        self, kind: str, one: Tracked, source: str, target: str, at_s: float, **about: object
    ) -> None:
        one.at = target
        move = {
            "id": f"{self.life}/{next(self._numbers)}",
            "kind": kind,
            "at_s": at_s,
            "request": one.id,
            "source": source,
            "target": target,
            "outcome": "committed",
            **about,
        }
        usual = kind == "handoff" and move["outcome"] == "committed"
        (self._handoffs if usual else self._moves).append(move)
        one.moves.append(move)

    # What the page asks for.

    def share(self, now: float, since_s: float, waiting: Sequence[Request]) -> dict[str, Any]:
        """Numbers, names and moments; small enough to send twice a second. `waiting` are those
        that have not been sent anywhere yet."""
        self._advance(self._now_s)
        running = list(self._requests.values())[-SHOWN_REQUESTS:]
        return {
            "life": self.life,
            "steps": self._history.since(since_s, now),
            "totals": {
                **self._totals,
                "running": len(self._requests) + len(waiting),
                "waiting": len(waiting),
            },
            "requests": [
                *(_running(one, now) for one in running),
                *(_waiting(one, now) for one in waiting[-SHOWN_REQUESTS:]),
            ],
            "ended": [_ended(event, one) for event, one in self._ended],
            "moves": list(self._moves),
            "handoffs": list(self._handoffs),
        }

    def instances(self) -> list[dict[str, Any]]:
        """All there are: every gateway hears every instance."""
        return [_instance(self._loads[name]) for name in sorted(self._loads)]


def _instance(load: Load) -> dict[str, Any]:
    cached = min(load.cached_blocks, load.free_blocks)
    return {
        "id": load.instance,
        "role": load.role.value,
        "state": load.state.value,
        "queue_requests": load.queue_requests,
        "queued_tokens": load.queued_tokens,
        "running_sequences": load.running_sequences,
        "step_s": load.step_s,
        "blocks": {
            "total": load.total_blocks,
            "used": max(load.total_blocks - load.free_blocks - load.pinned_blocks, 0),
            "pinned": load.pinned_blocks,
            "cached": cached,
        },
    }


def _running(one: Tracked, now: float) -> dict[str, Any]:
    arrived_s = one.timeline.arrived_s
    return {
        "id": one.id,
        "at": one.at,
        "prompt_tokens": one.prompt_tokens,
        "output_tokens": one.output_tokens,
        "arrived_s": arrived_s,
        "ttft_s": one.timeline.ttft_s,
        "slo": {"ttft_s": one.slo.ttft_s, "tpot_s": one.slo.tpot_s},
        "phases": _since(arrived_s, phases_so_far(one.timeline, now)),
        "moves": one.moves,
    }


def _waiting(request: Request, now: float) -> dict[str, Any]:
    """Not sent anywhere yet."""
    return {
        "id": request.id,
        "at": None,
        "prompt_tokens": len(request.prompt),
        "output_tokens": 0,
        "arrived_s": request.arrival_s,
        "ttft_s": None,
        "slo": {"ttft_s": request.slo.ttft_s, "tpot_s": request.slo.tpot_s},
        "phases": _since(request.arrival_s, [("queue", request.arrival_s, now)]),
        "moves": [],
    }


def _ended(event: Ended, one: Tracked | None) -> dict[str, Any]:
    timeline, arrived_s = event.timeline, event.timeline.arrived_s
    return {
        "id": event.request_id,
        "at": None if one is None else one.at,
        "outcome": event.outcome,
        "error": event.error,
        "prompt_tokens": event.prompt_tokens,
        "output_tokens": event.output_tokens,
        "arrived_s": arrived_s,
        "ended_s": timeline.finished_s or arrived_s,
        "ttft_s": timeline.ttft_s,
        "tpot_s": timeline.tpot_s(event.output_tokens),
        "e2e_s": None if timeline.finished_s is None else timeline.finished_s - arrived_s,
        "met": event.met_targets,
        "slo": {"ttft_s": event.slo.ttft_s, "tpot_s": event.slo.tpot_s},
        "phases": _since(arrived_s, phases(timeline)),
        "moves": [] if one is None else one.moves,
    }


def _since(arrived_s: float, found: Sequence[tuple[str, float, float]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "start_s": start_s - arrived_s, "end_s": end_s - arrived_s}
        for name, start_s, end_s in found
    ]
