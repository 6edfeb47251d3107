"""Tells the controller what a gateway sees of the load, for the autoscaler."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from cluster.control.scaling import MOST_SHARES, Usage
from placement.scaling.drift import Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.control.policy_source import PolicyText
    from cluster.watching.observer import Ended, Opened, Rerouted
    from engine.messages import Load, Migrated

TELL_S = 1.0


class UsageReporter:
    """An observer that counts between two reports."""

    def __init__(self, gateway: str, controller: Any) -> None:
        self._gateway, self._controller = gateway, controller
        self._unanswered: dict[str, Opened] = {}
        """Requests whose first token has not been told."""
        self._ttft_shares: list[float] = []
        self._tpot_shares: list[float] = []
        self._prompt_tokens = self._output_tokens = 0
        self._ended: list[Shape] = []

    async def run(
        self, waiting_requests: Callable[[], int], policy: Callable[[], PolicyText | None]
    ) -> None:
        while True:
            usage = self.take(waiting_requests(), policy())
            self._controller.used.remote(self._gateway, usage)
            await asyncio.sleep(TELL_S)

    def take(self, waiting_requests: int, policy: PolicyText | None = None) -> Usage:
        for request_id, event in list(self._unanswered.items()):
            if event.timeline.ttft_s is not None:
                self._answered(request_id)
        usage = Usage(
            waiting_requests,
            tuple(self._ttft_shares),
            tuple(self._tpot_shares),
            self._prompt_tokens,
            self._output_tokens,
            policy,
            tuple(self._ended),
        )
        self._ttft_shares, self._tpot_shares, self._ended = [], [], []
        self._prompt_tokens = self._output_tokens = 0
        return usage

    def opened(self, event: Opened) -> None:
        self._prompt_tokens += event.prompt_tokens
        self._unanswered[event.request_id] = event

    def _answered(self, request_id: str) -> None:
        """TTFT is told with the first token: a long answer's end would come too late."""
        event = self._unanswered.pop(request_id, None)
        if event is None or event.timeline.ttft_s is None or len(self._ttft_shares) >= MOST_SHARES:
            return
        self._ttft_shares.append(event.timeline.ttft_s / event.slo.ttft_s)

    def streamed(self, gaps_s: Sequence[float]) -> None:
        self._output_tokens += len(gaps_s)

    def ended(self, event: Ended) -> None:
        self._answered(event.request_id)
        if event.timeline.ttft_s is None or len(self._ended) >= MOST_SHARES:
            return
        self._ended.append(Shape(event.prompt_tokens, event.output_tokens, event.cached_tokens))
        tpot_s = event.timeline.tpot_s(event.output_tokens)
        if tpot_s is not None:
            self._tpot_shares.append(tpot_s / event.slo.tpot_s)

    def rerouted(self, event: Rerouted) -> None: ...

    def migrated(self, event: Migrated, at_s: float) -> None: ...

    def handoff_failed(self, request_id: str, reason: str, at_s: float) -> None: ...

    def loaded(self, load: Load, at_s: float) -> None: ...

    def lost(self, instance: str, at_s: float) -> None: ...
