"""What an instance tells of itself: to routers what is new, to balancers all there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.messages import Running
from kvtransfer.transfer import TransferState

if TYPE_CHECKING:
    from engine.request import Sequence


class Listing:
    """The sequences that an instance has taken on and not let go."""

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}
        self._untold: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.id] = sequence
        self._untold.append(sequence)

    def remove(self, request_id: str) -> None:
        self._sequences.pop(request_id, None)

    def news(self) -> tuple[Running, ...]:
        """Those that no news has told of: a router asks only which requests have arrived."""
        news = tuple([running(sequence) for sequence in self._untold])
        self._untold.clear()
        return news

    def everything(self) -> tuple[Running, ...]:
        return tuple([running(sequence) for sequence in self._sequences.values()])


def running(sequence: Sequence) -> Running:
    request = sequence.request
    prompt = len(request.prompt)
    return Running(
        request.id,
        sequence.epoch,
        sequence.state.value,
        request.priority,
        prompt,
        len(sequence.tokens) - prompt,
        len(sequence.blocks),
    )


def coming(sequence: Sequence, blocks: int) -> Running:
    """At the target of a transfer, which has set aside so many blocks, or none yet."""
    state = TransferState.COPYING if blocks else TransferState.OFFERED
    prompt = sequence.prompt_tokens
    return Running(
        sequence.id,
        sequence.epoch,
        state.value,
        sequence.request.priority,
        prompt,
        len(sequence.tokens) - prompt,
        blocks,
    )
