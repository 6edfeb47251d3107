"""The seven moments of a request from which every latency figure derives, in any clock."""

from __future__ import annotations

from dataclasses import dataclass

TTFT_PARTS = ("queue", "prefill", "transfer", "decode_queue", "first_step")


@dataclass(slots=True)
class Timeline:
    """A moment is None until it has happened, or for good where the request skipped it."""

    arrived_s: float
    prefill_started_s: float | None = None
    first_token_s: float | None = None
    """The prefill ended and its token went out."""
    transferred_s: float | None = None
    """The KV is committed on the decode side; without a hand-off, never."""
    decode_started_s: float | None = None
    second_token_s: float | None = None
    finished_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    def tpot_s(self, output_tokens: int) -> float | None:
        """Mean time per token after the first; None for an answer of a single token."""
        if self.first_token_s is None or self.finished_s is None or output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (output_tokens - 1)

    def parts_s(self) -> dict[str, float | None]:
        """Where the time to a flowing stream went; a part is None where it did not occur."""
        transferred = self.transferred_s or self.first_token_s
        return {
            "queue": _between(self.arrived_s, self.prefill_started_s),
            "prefill": _between(self.prefill_started_s, self.first_token_s),
            "transfer": _between(self.first_token_s, self.transferred_s),
            "decode_queue": _between(transferred, self.decode_started_s),
            "first_step": _between(self.decode_started_s, self.second_token_s),
        }


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else max(end_s - start_s, 0.0)
