"""Whether a token is one that its logits and its random number allow, up to rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.random import uniforms

if TYPE_CHECKING:
    import torch

    from engine.batch import Draw

ROUNDING = 1e-4


def allows(logits: torch.Tensor, draw: Draw, token: int) -> bool:
    """By the CDF of one row's logits in fp64: a draw may fall on either side of a near border."""
    exact, sampling = logits.double(), draw.sampling
    if sampling.temperature == 0.0 or sampling.top_k == 1:
        return bool(exact[token] >= exact.max() - ROUNDING)
    probabilities = (exact / sampling.temperature).softmax(0)
    ends = probabilities.cumsum(0)
    uniform = float(uniforms([sampling.seed], [draw.position])[0])
    low, high = float(ends[token] - probabilities[token]), float(ends[token])
    return low - ROUNDING <= uniform <= high + ROUNDING and float(probabilities[token]) > 0.0
