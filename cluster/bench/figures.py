"""Samples to the figures that `bench --json` prints, with how sure they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from engine.events import TTFT_PARTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from cluster.bench.sample import Sample

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
CONFIDENCE = 0.95
RESAMPLES = 1000
SCALES = (0.25, 0.33, 0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
LATENCIES: dict[str, Callable[[Sample], float | None]] = {
    "ttft_s": lambda one: one.ttft_s,
    "tpot_s": lambda one: one.tpot_s,
    "e2e_s": lambda one: one.e2e_s,
}


def figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """The fields of `bench --json` for one server."""
    lasted_s = duration_s(samples)
    finished = [one for one in samples if one.finished]
    met = sum(one.met() for one in samples)
    return {
        "requests": len(samples),
        "finished": len(finished),
        "failed": len(samples) - len(finished),
        "duration_s": lasted_s,
        "rate_rps": offered_rps(samples),
        "throughput_tokens_s": sum(one.output_tokens for one in finished) / lasted_s,
        "attainment": met / len(samples),
        "goodput_rps": met / lasted_s,
        "ttft_s": _spread(LATENCIES["ttft_s"], finished),
        "tpot_s": _spread(LATENCIES["tpot_s"], finished),
        "itl_s": spread([gap for one in finished for gap in one.gaps_s]),
        "e2e_s": _spread(LATENCIES["e2e_s"], finished),
        "ttft_parts_s": mean_parts(finished),
        "send_lag_s": spread([one.lag_s for one in samples]),
        "confidence": confidence(samples),
        "errors": _errors(samples),
    }


def by_round(samples: Sequence[Sample]) -> list[list[Sample]]:
    rounds: dict[int, list[Sample]] = {}
    for one in samples:
        rounds.setdefault(one.round, []).append(one)
    return list(rounds.values())


def duration_s(samples: Sequence[Sample]) -> float:
    """From the first request that was due to the last answer that ended, over all rounds."""
    return sum(
        max(one.ended_s for one in part) - min(one.due_s for one in part)
        for part in by_round(samples)
    )


def offered_rps(samples: Sequence[Sample]) -> float:
    """Arrivals a second: gaps over their span, so that a longer run does not look slower."""
    rounds = by_round(samples)
    due_s = [[one.due_s for one in part] for part in rounds]
    span_s = sum(max(part) - min(part) for part in due_s)
    return (len(samples) - len(rounds)) / span_s if span_s else len(samples) / duration_s(samples)


def _spread(latency: Callable[[Sample], float | None], samples: Iterable[Sample]) -> dict[str, Any]:
    return spread(_values(latency, samples))


def _values(latency: Callable[[Sample], float | None], samples: Iterable[Sample]) -> list[float]:
    return [value for one in samples if (value := latency(one)) is not None]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles; null where nothing was measured."""
    if not values:
        return dict.fromkeys(("mean", *QUANTILES))
    array = np.asarray(values)
    points = np.quantile(array, list(QUANTILES.values()))
    return {"mean": float(array.mean()), **dict(zip(QUANTILES, points.tolist(), strict=True))}


def mean_parts(samples: Sequence[Sample]) -> dict[str, float | None]:
    """Means over the requests whose server told parts; one that a request skipped took no time.

    Null for a part that none of them had.
    """
    told = [one.parts_s for one in samples if one.parts_s]
    return {part: _mean([parts.get(part) for parts in told]) for part in TTFT_PARTS}


def _mean(values: Sequence[float | None]) -> float | None:
    if all(value is None for value in values):
        return None
    return sum(value or 0.0 for value in values) / len(values)


def _errors(samples: Iterable[Sample]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for one in samples:
        if one.error is not None:
            counts[one.error] = counts.get(one.error, 0) + 1
    return counts


def confidence(samples: Sequence[Sample], seed: int = 0) -> dict[str, Any]:
    """95% intervals by bootstrap over requests."""
    intervals: dict[str, Any] = {"level": CONFIDENCE, "attainment": share_interval(samples, seed)}
    levels = list(QUANTILES.values())
    for name, latency in LATENCIES.items():
        values = np.array(_values(latency, samples))
        if len(values):
            edges = bootstrap(values, lambda draw: np.quantile(draw, levels), seed)
            intervals[name] = dict(zip(QUANTILES, edges.T.tolist(), strict=True))
        else:
            intervals[name] = dict.fromkeys(QUANTILES)
    return intervals


def share_interval(samples: Sequence[Sample], seed: int = 0) -> list[float]:
    """Of the share that met their targets."""
    met = np.array([one.met() for one in samples], float)
    edges: list[float] = bootstrap(met, lambda draw: draw.mean(), seed).tolist()
    return edges


def bootstrap(
    values: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], Any],
    seed: int,
) -> NDArray[np.float64]:
    """Low and high edge of what holds the statistic of `CONFIDENCE` of the resampled runs."""
    rng, tail = np.random.default_rng(seed), (1 - CONFIDENCE) / 2
    draws = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(RESAMPLES)]
    edges: NDArray[np.float64] = np.quantile(draws, [tail, 1 - tail], axis=0)
    return edges


def attainment_over_scale(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """The share of requests within their targets when those are tightened or loosened."""
    return [(scale, sum(one.met(scale) for one in samples) / len(samples)) for scale in SCALES]
