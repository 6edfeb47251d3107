"""A block pool that only counts: enough where no request can reuse another's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.blocks import BlockCounts, BlockPool
from engine.errors import OutOfBlocks

if TYPE_CHECKING:
    from collections.abc import Iterable

ANY_BLOCK = 0
"""Which one does not matter."""


class CountedPool(BlockPool):
    """Gives, takes and refuses as the pool with numbered blocks and no prefix cache would."""

    def __init__(self, total_blocks: int, block_tokens: int) -> None:
        super().__init__(0, block_tokens, cache_prefixes=False)
        self.total_blocks = total_blocks
        self._left = total_blocks
        self._reserved_blocks = 0

    @property
    def available(self) -> int:
        return self._left

    def allocate(self, count: int) -> list[int]:
        if count > self._left:
            raise OutOfBlocks(count, self._left)
        blocks = [ANY_BLOCK] * count
        self._left -= len(blocks)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        self._left += len(list(blocks))

    def reserve(self, count: int) -> list[int]:
        blocks = self.allocate(count)
        self._reserved_blocks += len(blocks)
        return blocks

    def claim(self, blocks: Iterable[int]) -> None:
        self._reserved_blocks -= len(list(blocks))

    def unreserve(self, blocks: Iterable[int]) -> None:
        freed = list(blocks)
        self._reserved_blocks -= len(freed)
        self._left += len(freed)

    def counts(self) -> BlockCounts:
        owned = self.total_blocks - self._left - self._reserved_blocks
        return BlockCounts(self._left, owned, self._reserved_blocks, 0, 0)

    def check(self) -> None:
        assert self._reserved_blocks >= 0
        assert 0 <= self._left <= self.total_blocks - self._reserved_blocks
