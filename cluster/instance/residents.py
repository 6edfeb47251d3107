"""Which requests an instance holds, where each of their sequences is, and for which gateway.

A sequence is in one place at a time: the prefill scheduler, held for its hand-off, the decode
scheduler, or, if it ended while a batch with it runs, doomed until that is over.
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
        self.changes = 0
        """How often a request has come or gone."""
        self.under_way: tuple[Batch, ...] = ()
        """The batch that runs now, and the one that was launched behind it."""

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
        self.changes += 1
        self._gateways[request_id] = gateway
        self.stamps[request_id] = {} if stamps is None else stamps

    def forget(self, request_id: str) -> None:
        """The sequence is in none of the places any more."""
        self.changes += 1
        self._handoffs.forget(request_id)
        del self._gateways[request_id]
        del self.stamps[request_id]

    def end(self, request_id: str) -> bool:
        """Take a request out of wherever it is, and say whether it was here. Its blocks are
        freed, or kept as a prefix, but not before the batches that use them are over."""
        sequence = self._remove(request_id)
        if sequence is None:
            return False
        if request_id not in self._doomed and self._is_under_way(request_id):
            self._doomed[request_id] = sequence
        else:
            self._remember_prefix(sequence)
            self._pool.release(sequence.blocks)
        self.forget(request_id)
        return True

    def is_doomed(self, request_id: str) -> bool:
        return request_id in self._doomed

    @property
    def has_namesakes(self) -> bool:
        """Whether a request is here again under the id of one that is doomed."""
        return any(self.find(request_id) is not None for request_id in self._doomed)

    def over(self, batch: Batch) -> None:
        self.under_way = tuple(one for one in self.under_way if one is not batch)

    def release_doomed(self, *, remember: bool) -> None:
        """Those that no batch under way has; as prefixes, if what was computed is to be trusted."""
        for request_id in [one for one in self._doomed if not self._is_under_way(one)]:
            sequence = self._doomed.pop(request_id)
            if remember:
                self._remember_prefix(sequence)
            self._pool.release(sequence.blocks)

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

    def _is_under_way(self, request_id: str) -> bool:
        """Whether a batch under way reads or writes the blocks of this sequence. One that is here
        again under the same id as a doomed one is in none."""
        return any(one.request_id == request_id for batch in self.under_way for one in batch.chunks)

    def _remember_prefix(self, sequence: Sequence) -> None:
        """A conversation's next turn, or a replay, finds what was computed."""
        full = sequence.tokens[: sequence.computed]
        hashes = prefix_hashes(full, self._pool.block_tokens, sequence.request.tenant)
        self._pool.remember(sequence.blocks, hashes)
