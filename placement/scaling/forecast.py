"""The load ahead, from equally spaced samples of the load so far."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from placement.scaling.policy import Forecast, PredictorName

if TYPE_CHECKING:
    from collections.abc import Sequence

LINE_SAMPLES = 30
"""That a line is fitted to."""
NOISE = 0.05
"""Variance of a sample, and of what changes level and slope between two, relative to each other."""
SEASONS = 3
"""Of history that Holt-Winters is fitted to at most."""


def history_samples(settings: Forecast) -> int:
    """How many samples are worth keeping."""
    if settings.season_s is None:
        return 4 * LINE_SAMPLES
    return SEASONS * _season_samples(settings) + 1


def forecast(samples: Sequence[float], settings: Forecast) -> float:
    """The load one horizon ahead, with its headroom; never negative.

    Holt-Winters begins after two seasons; until then the Kalman filter takes its place.
    """
    if not samples:
        return 0.0
    steps = ceil(settings.horizon_s / settings.sample_s)
    return max(_ahead(samples, settings, steps), 0.0) * (1.0 + settings.headroom)


def _ahead(samples: Sequence[float], settings: Forecast, steps: int) -> float:
    match settings.predictor:
        case PredictorName.CONSTANT:
            return samples[-1]
        case PredictorName.LINEAR:
            return _on_the_line(samples[-LINE_SAMPLES:], steps)
        case PredictorName.KALMAN:
            return _filtered(samples, steps)
        case PredictorName.HOLT_WINTERS:
            season = _season_samples(settings)
            if len(samples) < 2 * season:
                return _filtered(samples, steps)
            return _seasonal(samples[-SEASONS * season :], season, steps)


def _season_samples(settings: Forecast) -> int:
    assert settings.season_s is not None
    return round(settings.season_s / settings.sample_s)


def _on_the_line(samples: Sequence[float], steps: int) -> float:
    """Least squares, extended."""
    count = len(samples)
    middle, mean = (count - 1) / 2.0, sum(samples) / count
    spread = sum((x - middle) ** 2 for x in range(count))
    if spread == 0.0:
        return mean
    slope = sum((x - middle) * (y - mean) for x, y in enumerate(samples)) / spread
    return mean + slope * (count - 1 - middle + steps)


def _filtered(samples: Sequence[float], steps: int) -> float:
    """A Kalman filter over level and slope, its noise relative to a sample's variance of 1."""
    level, slope = samples[0], 0.0
    level_var, cross, slope_var = 1.0, 0.0, 1.0
    for sample in samples[1:]:
        level += slope
        level_var += 2.0 * cross + slope_var + NOISE
        cross += slope_var
        slope_var += NOISE * NOISE
        level_gain, slope_gain = level_var / (level_var + 1.0), cross / (level_var + 1.0)
        surprise = sample - level
        level, slope = level + level_gain * surprise, slope + slope_gain * surprise
        slope_var -= slope_gain * cross
        level_var, cross = (1.0 - level_gain) * level_var, (1.0 - level_gain) * cross
    return level + slope * steps


def _seasonal(samples: Sequence[float], season: int, steps: int) -> float:
    # Takes seconds to import, and few policies need it.
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    model = ExponentialSmoothing(
        list(samples), seasonal="add", seasonal_periods=season, initialization_method="heuristic"
    )
    # Fixed weights: fitting them to a day of samples costs seconds, and gains little.
    fitted = model.fit(
        smoothing_level=0.3, smoothing_seasonal=0.3, optimized=False, use_brute=False
    )
    return float(fitted.forecast(steps)[-1])
