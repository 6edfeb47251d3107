"""Whether copied KV is what its source holds: checksums of both pools, compared at the end.

A transfer is compared once it is sealed, while the source still keeps its blocks, so neither
side writes to what is read. One checksum covers a group of blocks, in all layers of a rank.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.instance.serving import order_parts, taken_from
from kvtransfer.transport import check_source_bounds, checksum, compare_checksums

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from cluster.instance.serving import Peers
    from engine.layout import KvLayout
    from kvtransfer.plan import RankPull
    from kvtransfer.transfer import PullOrder
    from kvtransfer.transport import Pool

GROUP_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class CompareRequest:
    order: PullOrder
    """What was pulled: one group of blocks."""
    layout: KvLayout
    """The reader's, of which it is `rank`."""
    rank: int


class Comparing:
    """Both parts of a rank: what it tells those that pulled from it, and its own look."""

    def __init__(self, layout: KvLayout, rank: int, pool: Pool, peers: Peers) -> None:
        self._layout, self._rank = layout, rank
        self._pool, self._peers = pool, peers

    async def checksum(self, request: CompareRequest) -> int:
        """The source's part."""
        copies = taken_from(self._rank, self._layout, request.order, request.layout, request.rank)
        check_source_bounds(copies, self._pool.nbytes)
        return await asyncio.to_thread(checksum, self._pool, copies.source_offsets, copies.nbytes)

    async def compare(self, order: PullOrder, next_group: Callable[[], Awaitable[None]]) -> None:
        """The target's part; ChecksumMismatch names the group that differs."""
        for group in _groups(order):
            await next_group()
            for part in order_parts(group, order.layout, self._layout, self._rank):
                await self._compare_part(group, part)

    async def _compare_part(self, group: PullOrder, part: RankPull) -> None:
        peer = f"{group.source}/{part.source_rank}"
        request = CompareRequest(group, self._layout, self._rank)
        sent = await self._peers.checksum(peer, request)
        offsets, nbytes = part.copies.target_offsets, part.copies.nbytes
        held = await asyncio.to_thread(checksum, self._pool, offsets, nbytes)
        blocks = ", ".join(map(str, group.source_blocks))
        compare_checksums(f"blocks {blocks} of {peer} in {self._peers.me}", sent, held)


def _groups(order: PullOrder) -> Iterator[PullOrder]:
    for start in range(0, len(order.source_blocks), GROUP_BLOCKS):
        part = slice(start, start + GROUP_BLOCKS)
        yield replace(
            order,
            source_blocks=order.source_blocks[part],
            target_blocks=order.target_blocks[part],
        )
