"""What a prefill-capable instance does beside computing: give finished KV to a decode instance.

The offer goes out when the prompt gets its blocks, so that the target can reserve and pull
while the rest is still being computed; the seal follows the first token. Until the target has
room the KV waits here: this pool is the buffer for bursts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.messages import TransferKind
from engine.request import SequenceState
from kvtransfer.transfer import TransferState

if TYPE_CHECKING:
    from engine.request import Sequence
    from kvtransfer.departures import Departures
    from kvtransfer.transfer import Outgoing


@dataclass(frozen=True, slots=True)
class Destination:
    gateway: str
    target: str
    epoch: int


class Handoffs:
    def __init__(self, departures: Departures) -> None:
        self._departures = departures
        self._destinations: dict[str, Destination] = {}
        self._held: dict[str, Sequence] = {}
        self._held_since_s: dict[str, float] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._destinations

    def in_pieces(self, request_id: str, tokens: int) -> bool:
        """Whether so much of a prompt's KV may be pulled while more of it is computed."""
        layout, settings = self._departures.layout, self._departures.settings
        nbytes = tokens * layout.instance_block_bytes // layout.block_tokens
        return request_id in self and nbytes >= settings.piece_bytes * settings.layer_groups

    def find(self, request_id: str) -> Sequence | None:
        return self._held.get(request_id)

    @property
    def held(self) -> tuple[Sequence, ...]:
        """Prefilled sequences that wait to be pulled."""
        return tuple(self._held.values())

    def plan(self, request_id: str, destination: Destination) -> None:
        self._destinations[request_id] = destination

    def target(self, request_id: str) -> str | None:
        """Who is to have its KV, if anybody else."""
        to = self._destinations.get(request_id)
        return None if to is None else to.target

    def admitted(self, sequence: Sequence, now: float) -> None:
        """The prompt has its blocks: offer what will be in them."""
        to = self._destinations.get(sequence.id)
        if to is not None and self._departures.of(sequence.id) is None:
            self._departures.offer(
                TransferKind.HANDOFF,
                sequence,
                gateway=to.gateway,
                target=to.target,
                epoch=to.epoch,
                now=now,
            )

    def computed(self, sequence: Sequence, tokens: int, layers: range, now: float) -> None:
        """KV of the first `tokens` positions stands in these layers."""
        out = self._departures.of(sequence.id)
        if out is not None and out.state in (TransferState.RESERVED, TransferState.COPYING):
            self._departures.ready(out, tokens, layers, now)

    def drawn(self, sequence: Sequence, now: float) -> Outgoing | None:
        """The first token is out: what remains is to move; returns the transfer once sealed."""
        sequence.state = SequenceState.HELD
        self._held[sequence.id] = sequence
        self._held_since_s[sequence.id] = now
        out = self._departures.of(sequence.id)
        if out is None or out.state is TransferState.OFFERED:
            return None
        self._departures.seal(out, now)
        return out

    def reserved(self, out: Outgoing, now: float) -> None:
        if out.sequence.id in self._held:
            self._departures.seal(out, now)
        elif out.sequence.computed:
            layers = range(self._departures.layout.layers)
            self._departures.ready(out, out.sequence.computed, layers, now)

    def pulled(self, out: Outgoing, now: float) -> Sequence | None:
        """The sequence that has moved away, once all of it has."""
        if not out.fully_pulled:
            return None
        self._departures.commit(out, now)
        return self.forget(out.sequence.id)

    def unwanted(self, now: float) -> list[Outgoing]:
        """Offers of finished KV that have waited for room too long."""
        since_s = now - self._departures.settings.offer_wait_s
        return [
            out
            for out in self._departures.open
            if out.state is TransferState.OFFERED
            and self._held_since_s.get(out.sequence.id, now) <= since_s
        ]

    def forget(self, request_id: str) -> Sequence | None:
        """Returns the sequence if it was held here."""
        self._destinations.pop(request_id, None)
        self._held_since_s.pop(request_id, None)
        return self._held.pop(request_id, None)
