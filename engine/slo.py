"""Latency targets and what it means to meet them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets of one request: time to its first token, and mean time per token after it."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1

    def met_by(self, ttft_s: float, tpot_s: float | None) -> bool:
        """`tpot_s` is None for an answer of a single token, which has no second to wait for."""
        return ttft_s <= self.ttft_s and (tpot_s is None or tpot_s <= self.tpot_s)
