"""Least squares that neither outliers nor negative costs can bend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

HUBER_RELATIVE_ERROR = 0.05
ROUNDS = 40


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients, none negative, and each sample's error relative to its measurement."""

    coefficients: NDArray[np.float64]
    relative_errors: NDArray[np.float64]

    @property
    def median_error(self) -> float:
        return float(np.median(np.abs(self.relative_errors)))

    @property
    def p90_error(self) -> float:
        return float(np.quantile(np.abs(self.relative_errors), 0.9))


def fit_costs(features: NDArray[np.float64], seconds: NDArray[np.float64]) -> Fit:
    """Huber regression of relative errors by reweighting; every cost at least zero."""
    scaled = features / seconds[:, None]
    target = np.ones(len(seconds))
    weights = np.ones(len(seconds))
    coefficients = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        root = np.sqrt(weights)
        following = nonnegative_least_squares(scaled * root[:, None], target * root)
        settled = np.allclose(following, coefficients, rtol=1e-9, atol=0)
        coefficients = following
        if settled:
            break
        residuals = np.abs(scaled @ coefficients - target)
        weights = np.minimum(1.0, HUBER_RELATIVE_ERROR / np.maximum(residuals, 1e-12))
    return Fit(coefficients, scaled @ coefficients - target)


def nonnegative_least_squares(
    features: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Lawson and Hanson's active-set method, on columns scaled to unit length."""
    lengths = np.linalg.norm(features, axis=0)
    lengths[lengths == 0] = 1.0
    matrix = features / lengths
    count = matrix.shape[1]
    solution, free = np.zeros(count), np.zeros(count, dtype=bool)
    for _ in range(10 * count):
        gradient = matrix.T @ (target - matrix @ solution)
        if free.all() or gradient[~free].max() <= 1e-10:
            break
        free[int(np.argmax(np.where(free, -np.inf, gradient)))] = True
        solution = _descend(matrix, target, solution, free)
    scaled: NDArray[np.float64] = solution / lengths
    return scaled


def _descend(
    matrix: NDArray[np.float64],
    target: NDArray[np.float64],
    solution: NDArray[np.float64],
    free: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """The least squares over the free columns, after those it drives below zero are bound."""
    while free.any():
        candidate = np.zeros_like(solution)
        candidate[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        below = free & (candidate <= 0)
        if not below.any():
            return candidate
        steps = solution[below] / np.maximum(solution[below] - candidate[below], 1e-300)
        solution = solution + steps.min() * (candidate - solution)
        free &= solution > 1e-14
        solution = np.where(free, solution, 0.0)
    return np.zeros_like(solution)
