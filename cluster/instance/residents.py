"""Which requests an instance holds, where each of their sequences is, and for which gateway.

A sequence is in one place at a time: the prefill scheduler, held for its hand-off, the decode
scheduler, or, if it ended while its batch runs, doomed until that is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.blocks import prefix_hashes
from engine.request import SequenceState

if TYPE_CHECKING:
    from engine.batch import Batch
    from engine.blocks import BlockPool
    from engine.request import Sequence
    from placement.role import RoleBatcher
    from prefill.handoff import Handoffs


class Residents:
    def __init__(
        self, pool: BlockPool, batcher: RoleBatcher, handoffs: Handoffs, *, tombstones: int
    ) -> None:
        self.stamps: dict[str, dict[str, float]] = {}
        """What is to be told with a request's first tokens: when each of its phases began."""
        self._pool, self._most_tombstones = pool, tombstones
        self._prefill, self._decode, self._handoffs = batcher.prefill, batcher.decode, handoffs
        self._gateways: dict[str, str] = {}
        self._tombstones: dict[str, int] = {}
        self._doomed: dict[str, Sequence] = {}
        self.under_way: Batch | None = None
        """The batch that runs now."""

    def find(self, request_id: str) -> Sequence | None:
        return (
            self._prefill.find(request_id)
            or self._decode.find(request_id)
            or self._handoffs.find(request_id)
        )

    def all(self) -> list[Sequence]:
        return [*self._prefill.sequences, *self._handoffs.held, *self._decode.sequences]

    def gateway(self, request_id: str) -> str:
        return self._gateways[request_id]

    def of_gateway(self, name: str) -> list[str]:
        return [request_id for request_id, gateway in self._gateways.items() if gateway == name]

    def is_decoding(self, sequence: Sequence) -> bool:
        return sequence.state is SequenceState.RUNNING and sequence.id in self._decode

    def waits_for_prefill(self, sequence: Sequence) -> bool:
        """Whether nothing of its prompt has been begun."""
        return sequence.id in self._prefill and not sequence.blocks

    def enter(self, request_id: str, gateway: str, stamps: dict[str, float] | None = None) -> None:
        self._gateways[request_id] = gateway
        self.stamps[request_id] = {} if stamps is None else stamps

    def forget(self, request_id: str) -> None:
        """The sequence is in none of the places any more."""
        self._handoffs.forget(request_id)
        del self._gateways[request_id]
        del self.stamps[request_id]

    def end(self, request_id: str) -> bool:
        """Take a request out of wherever it is, and say whether it was here. Its blocks are
        freed, or kept as a prefix, but not before the batch that uses them is over."""
        sequence = self._remove(request_id)
        if sequence is None:
            return False
        if self._runs_now(request_id):
            self._doomed[request_id] = sequence
        else:
            self._remember_prefix(sequence)
            self._pool.release(sequence.blocks)
        self.forget(request_id)
        return True

    def is_doomed(self, request_id: str) -> bool:
        return request_id in self._doomed

    def release_doomed(self) -> None:
        for sequence in self._doomed.values():
            self._pool.release(sequence.blocks)
        self._doomed.clear()

    def bury(self, request_id: str, epoch: int) -> None:
        """Remember the aborted, so that a message that comes late does not revive one."""
        self._tombstones[request_id] = max(epoch, self._tombstones.get(request_id, epoch))
        while len(self._tombstones) > self._most_tombstones:
            del self._tombstones[next(iter(self._tombstones))]

    def is_buried(self, request_id: str, epoch: int) -> bool:
        return self._tombstones.get(request_id, -1) >= epoch

    def _remove(self, request_id: str) -> Sequence | None:
        if request_id in self._prefill:
            return self._prefill.remove(request_id)
        if request_id in self._decode:
            return self._decode.remove(request_id)
        return self._handoffs.forget(request_id)

    def _runs_now(self, request_id: str) -> bool:
        """Whether the batch under way reads or writes the blocks of this sequence; one that was
        started again under the same id has none yet."""
        if self.under_way is None or request_id in self._doomed:
            return False
        return any(chunk.request_id == request_id for chunk in self.under_way.chunks)

    def _remember_prefix(self, sequence: Sequence) -> None:
        """A conversation's next turn, or a replay, finds what was computed."""
        full = sequence.tokens[: sequence.computed]
        hashes = prefix_hashes(full, self._pool.block_tokens, sequence.request.tenant)
        self._pool.remember(sequence.blocks, hashes)
