"""What became of every request, and the figures that `simulate --json` and `bench --json` share."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from math import isnan, nan
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from placement.workload import Workload

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
GAP_BINS = 2000
MOST_GAPS = 100_000
"""Kept apart before neighbours are added up."""
MOMENTS = (
    "prefill_started_s",
    "first_token_s",
    "transferred_s",
    "decode_started_s",
    "second_token_s",
    "finished_s",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Moments of each request; NaN where one did not occur."""

    arrived_s: NDArray[np.float64]
    output_tokens: NDArray[np.int64]
    slo_ttft_s: NDArray[np.float64]
    slo_tpot_s: NDArray[np.float64]
    prefill_started_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    transferred_s: NDArray[np.float64]
    decode_started_s: NDArray[np.float64]
    second_token_s: NDArray[np.float64]
    finished_s: NDArray[np.float64]
    gaps_s: NDArray[np.float64]
    """Times between tokens, each standing for as many as `gap_counts` says."""
    gap_counts: NDArray[np.float64]
    busy_s: dict[str, float] = field(default_factory=dict)
    """Per instance."""
    preemptions: int = 0
    beyond: tuple[str, ...] = ()
    """What was asked of the latency model outside its measurements."""
    refused: int = 0
    """Not let in; they count among those that failed."""
    stopped: bool = False
    """Given up early, when attainment could no longer be reached."""

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        return self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """Mean time per token after the first; NaN for a single token."""
        later = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        tpot: NDArray[np.float64] = (self.finished_s - self.first_token_s) / later
        return tpot

    @property
    def e2e_s(self) -> NDArray[np.float64]:
        return self.finished_s - self.arrived_s

    @property
    def finished(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.finished_s)

    @property
    def met(self) -> NDArray[np.bool_]:
        """Whether each request finished within both its targets."""
        tpot = self.tpot_s
        in_pace = np.isnan(tpot) | (tpot <= self.slo_tpot_s)
        met: NDArray[np.bool_] = self.finished & (self.ttft_s <= self.slo_ttft_s) & in_pace
        return met

    @property
    def attainment(self) -> float:
        return 0.0 if self.stopped else float(self.met.mean())

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last answer's end."""
        ends = self.finished_s[self.finished]
        return float(ends.max() - self.arrived_s[0]) if len(ends) else 0.0

    def parts_s(self) -> dict[str, NDArray[np.float64]]:
        """Where the time to a flowing stream went, per request."""
        transferred = np.where(np.isnan(self.transferred_s), self.first_token_s, self.transferred_s)
        return {
            "queue": self.prefill_started_s - self.arrived_s,
            "prefill": self.first_token_s - self.prefill_started_s,
            "transfer": self.transferred_s - self.first_token_s,
            "decode_queue": self.decode_started_s - transferred,
            "first_step": self.second_token_s - self.decode_started_s,
        }

    def figures(self) -> dict[str, Any]:
        count, span_s = len(self.arrived_s), float(self.arrived_s[-1] - self.arrived_s[0])
        duration_s, met = self.duration_s, int(self.met.sum())
        finished = self.finished
        tokens = float(self.output_tokens[finished].sum())
        return {
            "requests": count,
            "finished": int(finished.sum()),
            "failed": count - int(finished.sum()),
            "duration_s": duration_s,
            "rate_rps": (count - 1) / span_s if span_s else None,
            "throughput_tokens_s": tokens / duration_s if duration_s else None,
            "attainment": met / count,
            "goodput_rps": met / duration_s if duration_s else None,
            "ttft_s": spread(self.ttft_s),
            "tpot_s": spread(self.tpot_s),
            "itl_s": weighted_spread(self.gaps_s, self.gap_counts),
            "e2e_s": spread(self.e2e_s),
            "ttft_parts_s": {name: _mean(part) for name, part in self.parts_s().items()},
        }


def spread(values: NDArray[np.float64]) -> dict[str, float | None]:
    """Mean and percentiles; None where there is nothing."""
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return dict.fromkeys(("mean", *QUANTILES))
    points = np.quantile(known, list(QUANTILES.values())).tolist()
    return {"mean": float(known.mean()), **dict(zip(QUANTILES, points, strict=True))}


def weighted_spread(
    values: NDArray[np.float64], counts: NDArray[np.float64]
) -> dict[str, float | None]:
    if len(values) == 0:
        return dict.fromkeys(("mean", *QUANTILES))
    order = np.argsort(values, kind="stable")
    below = np.cumsum(counts[order])
    places = [np.searchsorted(below, share * below[-1]) for share in QUANTILES.values()]
    points = [float(values[order[min(place, len(values) - 1)]]) for place in places]
    mean = float((values * counts).sum() / counts.sum())
    return {"mean": mean, **dict(zip(QUANTILES, points, strict=True))}


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


class Ledger:
    """Moments as they happen, by request index, and whether the target can still be reached."""

    def __init__(
        self, workload: Workload, slo_ttft_s: float, slo_tpot_s: float, may_miss: int | None
    ) -> None:
        count = len(workload)
        self.workload = workload
        self.slo_ttft_s = _targets(workload.slo_ttft_s, slo_ttft_s, count)
        self.slo_tpot_s = _targets(workload.slo_tpot_s, slo_tpot_s, count)
        nothing = array("d", [nan]) * count
        self.moments = {name: array("d", nothing) for name in MOMENTS}
        self._firsts, self._ends = self.moments["first_token_s"], self.moments["finished_s"]
        self.arrival_s: list[float] = workload.arrival_s.tolist()
        self.output_tokens: list[int] = workload.output_tokens.tolist()
        self._later: list[int] = np.maximum(workload.output_tokens - 1, 1).tolist()
        self._gaps: list[tuple[float, float]] = []
        self.missed = 0
        self.ended = 0
        self._may_miss = count if may_miss is None else may_miss

    @property
    def hopeless(self) -> bool:
        return self.missed > self._may_miss

    def look_ahead(self, now: float, arrived: int) -> None:
        """Count what has not ended but has run out of time for either target."""
        firsts, ends = self._firsts, self._ends
        missed = 0
        for index in range(arrived):
            first_s = firsts[index]
            if isnan(first_s):
                missed += now - self.arrival_s[index] > self.slo_ttft_s[index]
            elif first_s - self.arrival_s[index] > self.slo_ttft_s[index]:
                missed += 1
            else:
                end_s = ends[index]
                lasted_s = (now if isnan(end_s) else end_s) - first_s
                missed += lasted_s > self.slo_tpot_s[index] * self._later[index]
        self.missed = max(self.missed, missed)

    def moment(self, name: str, index: int, now: float) -> None:
        """Only the first time counts, of a request that is answered anew after a failure."""
        if isnan(self.moments[name][index]):
            self.moments[name][index] = now

    def shares(self, index: int) -> tuple[float, float | None]:
        """TTFT and TPOT of a finished request over its targets."""
        first_s, later = self._firsts[index], self.output_tokens[index] - 1
        ttft_share = (first_s - self.arrival_s[index]) / self.slo_ttft_s[index]
        if not later:
            return ttft_share, None
        return ttft_share, (self._ends[index] - first_s) / later / self.slo_tpot_s[index]

    def first_token(self, index: int, now: float) -> None:
        if not isnan(self._firsts[index]):
            return
        self._firsts[index] = now
        if now - self.arrival_s[index] > self.slo_ttft_s[index]:
            self.missed += 1

    def finished(self, index: int, now: float) -> None:
        first_s = self._firsts[index]
        self._ends[index] = now
        self.ended += 1
        later = self.output_tokens[index] - 1
        in_time = first_s - self.arrival_s[index] <= self.slo_ttft_s[index]
        if in_time and later and (now - first_s) / later > self.slo_tpot_s[index]:
            self.missed += 1

    def gap(self, seconds: float, count: float) -> None:
        self._gaps.append((seconds, count))
        if len(self._gaps) >= MOST_GAPS:
            self._gaps = list(map(tuple, binned(np.array(self._gaps)).tolist()))

    def failed(self, index: int) -> None:
        first_s = self._firsts[index]
        late = first_s - self.arrival_s[index] > self.slo_ttft_s[index]
        self.ended += 1
        self.missed += not late

    def outcome(
        self, busy_s: dict[str, float], preemptions: int, beyond: tuple[str, ...], refused: int = 0
    ) -> Outcome:
        gaps = np.array(self._gaps, dtype=float).reshape(-1, 2)
        return Outcome(
            arrived_s=self.workload.arrival_s,
            output_tokens=self.workload.output_tokens,
            slo_ttft_s=np.array(self.slo_ttft_s),
            slo_tpot_s=np.array(self.slo_tpot_s),
            gaps_s=gaps[:, 0],
            gap_counts=gaps[:, 1],
            busy_s=busy_s,
            preemptions=preemptions,
            beyond=beyond,
            refused=refused,
            stopped=self.hopeless,
            **{name: np.array(values) for name, values in self.moments.items()},
        )


def binned(gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """(seconds, count) rows of neighbours added up: as many however many there were."""
    if len(gaps) <= GAP_BINS:
        return gaps
    groups = np.array_split(gaps[np.argsort(gaps[:, 0], kind="stable")], GAP_BINS)
    rows = [(np.average(g[:, 0], weights=g[:, 1]), g[:, 1].sum()) for g in groups]
    return np.array(rows)


def _targets(own: NDArray[np.float64] | None, default: float, count: int) -> list[float]:
    """A request's own target, or the deployment's."""
    if own is None:
        return [default] * count
    targets: list[float] = np.where(np.isnan(own), default, own).tolist()
    return targets
