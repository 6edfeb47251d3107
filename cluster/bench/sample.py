"""One request as its client saw it, every moment in seconds since the start of the run."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.events import TTFT_PARTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TextIO

    from engine.slo import Slo


@dataclass(slots=True)
class Sample:
    """Latencies count from `due_s`: a client or server that falls behind cannot hide it."""

    index: int
    due_s: float
    """When the request should have been sent."""
    slo: Slo
    prompt_tokens: int
    wanted_tokens: int
    round: int = 0
    """Servers compared in one run take turns; times count from the start of their round."""
    sent_s: float = 0.0
    ended_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    parts_s: dict[str, float | None] | None = None
    error: str | None = None
    text: str = ""

    @property
    def finished(self) -> bool:
        return self.error is None

    @property
    def lag_s(self) -> float:
        """How late the generator itself was."""
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.due_s if self.finished else None

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of a single token."""
        if not self.finished or self.output_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        return self.token_s[-1] - self.due_s if self.finished else None

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies, one per chunk after the first."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]

    def met(self, scale: float = 1.0) -> bool:
        """Whether it met its targets, each multiplied by `scale`; a failed request did not."""
        ttft_s, tpot_s = self.ttft_s, self.tpot_s
        if ttft_s is None:
            return False
        return self.slo.met_by(ttft_s / scale, None if tpot_s is None else tpot_s / scale)


COLUMNS = (
    "server", "round", "index", "due_s", "sent_s", "first_token_s", "ended_s", "prompt_tokens",
    "output_tokens", "ttft_s", "tpot_s", "e2e_s", "longest_gap_s", "slo_ttft_s", "slo_tpot_s",
    "met", *(f"{part}_s" for part in TTFT_PARTS), "error",
)  # fmt: skip


def write_samples(out: TextIO, runs: Iterable[tuple[str, Sequence[Sample]]]) -> None:
    """One row a request; an empty cell is something that did not happen or was not told."""
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for server, samples in runs:
        writer.writerows(_row(server, sample) for sample in samples)


def _row(server: str, one: Sample) -> list[object]:
    parts = one.parts_s or {}
    first_token_s = one.token_s[0] if one.token_s else None
    cells = [
        one.due_s, one.sent_s, first_token_s, one.ended_s, one.prompt_tokens, one.output_tokens,
        one.ttft_s, one.tpot_s, one.e2e_s, max(one.gaps_s, default=None), one.slo.ttft_s,
        one.slo.tpot_s, int(one.met()), *(parts.get(part) for part in TTFT_PARTS), one.error,
    ]  # fmt: skip
    return [server, one.round, one.index, *(_cell(cell) for cell in cells)]


def _cell(cell: object) -> object:
    if cell is None:
        return ""
    return f"{cell:.6f}" if isinstance(cell, float) else cell
