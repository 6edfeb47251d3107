"""One movement of a request's KV between two instances: hand-off and migration alike.

    OFFERED -> RESERVED -> COPYING -> COMMITTED
        \\          \\          \\-> ABORTED

The target reserves before anything is copied, then pulls what the source says is ready, and
may use it only after the source confirmed that it held its blocks for the whole copy. Each side
keeps one of the two records below; every verb asserts the state it starts in.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from engine.messages import Ready, Sealed, TransferKind

if TYPE_CHECKING:
    from engine.layout import KvLayout
    from engine.messages import Offer
    from engine.request import Sequence


class TransferState(str, Enum):
    OFFERED = "offered"
    RESERVED = "reserved"
    COPYING = "copying"
    COMMITTED = "committed"
    ABORTED = "aborted"


_NEXT = {
    TransferState.OFFERED: {TransferState.RESERVED, TransferState.ABORTED},
    TransferState.RESERVED: {TransferState.COPYING, TransferState.ABORTED},
    TransferState.COPYING: {TransferState.COMMITTED, TransferState.ABORTED},
    TransferState.COMMITTED: set(),
    TransferState.ABORTED: set(),
}


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """Bounds of every transfer; all of them are fields of the `transfer` config section."""

    lease_s: float = 3.0
    """A side that hears nothing for so long gives the transfer up."""
    heartbeat_s: float = 0.5
    """How often each side repeats its last word, which also mends lost messages."""
    max_offers: int = 256
    """Offers that may wait for room on a target; more are refused."""
    offer_wait_s: float = 2.0
    """How long finished KV waits for room at its target; then its instance decodes it. Without
    this bound two instances that prefill for each other could wait for one another for ever."""
    layer_groups: int = 4
    """Pieces in which a prefill lets its KV be pulled while it still computes."""
    piece_bytes: int = 1 << 20
    """Smaller pieces wait for the first token: a message and a pull of their own cost more time
    than they hide."""
    pause_budget_s: float = 0.05
    """A migration seals once the rest can move within this, or one TPOT target if smaller."""
    max_rounds: int = 8
    copy_share: float = 0.04
    """Part of the time that the rounds of a live migration keep a CPU copying, so that the other
    sequences hardly notice; its last round, hand-offs and GPUs copy as fast as they can."""
    accept_lease_s: float = 10.0
    """How long a migrated request's source waits for news of the target's first token."""
    checksums: bool = False
    """Whether a target compares what it has copied with its source, by checksums, before it uses
    it: both sides read all of it once more. For links that are not trusted to keep bytes whole."""


@dataclass(slots=True, eq=False)
class _Stateful:
    """The transition table, enforced."""

    state: TransferState = field(default=TransferState.OFFERED, init=False)

    def become(self, state: TransferState) -> None:
        assert state in _NEXT[self.state], f"{self.state.value} -> {state.value}"
        self.state = state

    @property
    def over(self) -> bool:
        return not _NEXT[self.state]


@dataclass(slots=True, eq=False)
class Outgoing(_Stateful):
    """The source's record."""

    id: str
    kind: TransferKind
    sequence: Sequence
    gateway: str
    target: str
    epoch: int
    """The owner's epoch once committed."""
    started_s: float
    lease_until_s: float
    reason: str = ""
    pinned: list[int] = field(default_factory=list)
    sealed: Sealed | None = None
    sealed_at_s: float | None = None
    pulled_tokens: int = 0
    checked: bool = False
    """Whether the target has nothing left to compare."""
    rounds: int = 0
    round_started_s: float = 0.0
    round_from: int = 0
    round_tokens: int = 0
    tokens_per_s: float | None = None
    """How fast this target pulls, measured by the last round."""

    def ready(self, tokens: int, layers: range) -> Ready:
        blocks = tuple(self.sequence.blocks)
        return Ready(self.id, tokens, layers.start, layers.stop, blocks)

    def seal(self, now: float) -> Sealed:
        assert self.sealed is None
        sequence = self.sequence
        self.sealed_at_s = now
        self.sealed = Sealed(
            self.id, tuple(sequence.output), sequence.computed, tuple(sequence.blocks)
        )
        return self.sealed

    @property
    def fully_pulled(self) -> bool:
        if self.sealed is None or not self.checked:
            return False
        return self.pulled_tokens >= self.sealed.computed


@dataclass(frozen=True, slots=True)
class PullOrder:
    """Copy these blocks of these layers from the source instance's pool into the own one."""

    transfer: str
    number: int
    source: str
    layout: KvLayout
    source_blocks: tuple[int, ...]
    target_blocks: tuple[int, ...]
    first_layer: int
    last_layer: int
    tokens: int
    """Positions that these blocks hold; what lies behind them has no meaning."""
    urgent: bool = True
    """Whether somebody waits for it; the live rounds of a migration have time."""
    compare: bool = False
    """Whether the bytes are here already, and only their checksums are to be compared."""


@dataclass(frozen=True, slots=True)
class PullCancel:
    """Fence every copy of this transfer; each still reports its end."""

    transfer: str


@dataclass(slots=True, eq=False)
class Incoming(_Stateful):
    """The target's record."""

    offer: Offer
    source: str
    lease_until_s: float
    arrived_s: float
    prefix: list[bytes] = field(default_factory=list)
    """Hashes of the prompt's full blocks, if prefixes are shared here."""
    compares: bool = False
    comparison: int | None = None
    """The number of the order that compares all of it, once there is one."""
    shared: list[int] = field(default_factory=list)
    """Blocks of a prefix that was here already; they are not copied."""
    reserved: list[int] = field(default_factory=list)
    requested: list[int] = field(default_factory=list)
    """Per layer, how many leading positions have been ordered."""
    outstanding: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Orders under way: number -> (first layer, last layer, positions)."""
    arrived: list[int] = field(default_factory=list)
    """Per layer, how many leading positions are here."""
    sealed: Sealed | None = None
    reported: int = 0
    orders: int = 0

    @property
    def id(self) -> str:
        return self.offer.transfer

    @property
    def blocks(self) -> list[int]:
        return self.shared + self.reserved

    def reserve(self, shared: list[int], reserved: list[int]) -> None:
        self.become(TransferState.RESERVED)
        self.shared, self.reserved = shared, reserved
        have = len(shared) * self.offer.layout.block_tokens
        self.requested = [have] * self.offer.layout.layers
        self.arrived = [have] * self.offer.layout.layers

    def order(self, ready: Ready) -> list[PullOrder]:
        """Orders for what is ready and not yet ordered, one per run of equally far layers."""
        orders = []
        first = ready.first_layer
        while first < ready.last_layer:
            last = first + 1
            while last < ready.last_layer and self.requested[last] == self.requested[first]:
                last += 1
            if self.requested[first] < ready.tokens:
                orders.append(self._order_run(first, last, ready))
            first = last
        return orders

    def order_rest(self) -> list[PullOrder]:
        """After the seal everything up to `computed` may be read."""
        assert self.sealed is not None
        if self.state is TransferState.RESERVED:
            self.become(TransferState.COPYING)
        layers = self.offer.layout.layers
        return self.order(Ready(self.id, self.sealed.computed, 0, layers, self.sealed.blocks))

    @property
    def may_compare(self) -> bool:
        """Whether all is here, will not change any more and has not been compared yet."""
        if not self.compares or self.sealed is None or self.comparison is not None:
            return False
        return self.has(self.sealed.computed)

    @property
    def checked(self) -> bool:
        if not self.compares:
            return True
        return self.comparison is not None and self.comparison not in self.outstanding

    def order_comparison(self) -> PullOrder:
        """Compares every block that was copied; a prefix known here before was not."""
        assert self.sealed is not None
        self.reported = 0  # it counts once it has been compared
        block_tokens = self.offer.layout.block_tokens
        have, tokens = len(self.shared), self.sealed.computed
        order = self._order(
            range(have, -(-tokens // block_tokens)),
            range(self.offer.layout.layers),
            self.sealed.blocks,
            tokens,
        )
        self.comparison = order.number
        return replace(order, compare=True)

    def _order_run(self, first: int, last: int, ready: Ready) -> PullOrder:
        block_tokens = self.offer.layout.block_tokens
        start = self.requested[first] // block_tokens
        end = -(-ready.tokens // block_tokens)
        self.requested[first:last] = [ready.tokens] * (last - first)
        if self.state is TransferState.RESERVED:
            self.become(TransferState.COPYING)
        return self._order(range(start, end), range(first, last), ready.blocks, ready.tokens)

    def _order(
        self, places: range, layers: range, source_blocks: tuple[int, ...], tokens: int
    ) -> PullOrder:
        """For these places of both block tables."""
        self.orders += 1
        self.outstanding[self.orders] = (layers.start, layers.stop, tokens)
        return PullOrder(
            self.id,
            self.orders,
            self.source,
            self.offer.layout,
            source_blocks[places.start : places.stop],
            tuple(self.blocks[places.start : places.stop]),
            layers.start,
            layers.stop,
            tokens - places.start * self.offer.layout.block_tokens,
            urgent=self.sealed is not None or self.offer.kind is TransferKind.HANDOFF,
        )

    def order_done(self, number: int) -> None:
        first, last, tokens = self.outstanding.pop(number)
        for layer in range(first, last):
            self.arrived[layer] = max(self.arrived[layer], tokens)

    def has(self, computed: int) -> bool:
        """Whether all that a confirmation speaks of is here."""
        if self.state is TransferState.OFFERED or self.complete_tokens is None:
            return False
        return self.complete_tokens >= computed

    def commit(self) -> None:
        if self.state is TransferState.RESERVED:
            self.become(TransferState.COPYING)  # all of it was a prefix known here
        self.become(TransferState.COMMITTED)

    @property
    def complete_tokens(self) -> int | None:
        """Leading positions that are here in all layers; None while copies are under way."""
        return None if self.outstanding else min(self.arrived)
