"""A balancer that predicts each instance's TPOT from the latency profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.request import SequenceState
from placement.balancing.balancer import Balancer
from placement.balancing.settings import BalancerPolicy, BalancerSettings

if TYPE_CHECKING:
    from engine.messages import Running
    from placement.balancing.standing import Standing
    from placement.latency.model import LatencyModel

AHEAD_S = 10.0
"""Of decoding in which a move is to pay."""


def balancer_for(settings: BalancerSettings | None = None) -> Balancer:
    """By the policy that the settings name."""
    chosen = settings or BalancerSettings()
    return PaceBalancer(chosen) if chosen.policy is BalancerPolicy.TPOT else Balancer(chosen)


def decode_line(latency: LatencyModel, batch: int = 64) -> tuple[float, float, float]:
    """`step_s`, `step_sequence_s` and `step_kv_token_s` of a latency model, around this batch."""
    least_s = latency.fixed_s(1, 1)
    each_s = (latency.fixed_s(batch, batch) - least_s) / (batch - 1)
    return least_s - each_s, each_s, latency.read_s


class PaceBalancer(Balancer):
    """Relieves instances whose next step will miss the target, besides those short of room."""

    def __init__(self, settings: BalancerSettings) -> None:
        super().__init__(settings)
        self._slow: set[str] = set()

    def _press(self, standings: list[Standing]) -> None:
        super()._press(standings)
        for one in standings:
            if self._share(one) > self.settings.act_share:
                self._slow.add(one.name)
            elif self._share(one) < self.settings.rest_share:
                self._slow.discard(one.name)
        self._slow &= {one.name for one in standings}
        self._pressed |= self._slow

    def _relieved(self, source: Standing) -> bool:
        in_pace = self._share(source) < self.settings.rest_share
        return in_pace and super()._relieved(source)

    def _relaxed(self, target: Standing) -> bool:
        return super()._relaxed(target) and self._share(target) < self.settings.rest_share

    def _appeal(self, target: Standing) -> float:
        return -self._share(target)

    def _worth(self, one: Running, source: Standing, target: Standing) -> float:
        """Where pace is short: seconds of decoding that the slower of both gains, per second of
        moving."""
        if source.name not in self._slow:
            return super()._worth(one, source, target)
        tokens = _context(one)
        before = max(self._share(source), self._share(target))
        after = max(self._share(source, -1, -tokens), self._share(target, 1, tokens))
        cost_s = self.settings.fixed_cost_s + tokens / self.settings.copy_tokens_s
        return (before - after) / before * AHEAD_S / cost_s

    def _share(self, standing: Standing, sequences: int = 0, tokens: int = 0) -> float:
        """The next step, as a share of the target."""
        batch = standing.batch + sequences
        if batch <= 0:
            return 0.0
        running = [one for one in standing.here.values() if _decodes(one)]
        read = sum(_context(one) for one in running) + tokens
        line = self.settings
        step_s = line.step_s + line.step_sequence_s * batch + line.step_kv_token_s * read
        return step_s / line.tpot_s


def _context(one: Running) -> int:
    return one.prompt_tokens + one.output_tokens


def _decodes(one: Running) -> bool:
    return one.state == SequenceState.RUNNING.value
