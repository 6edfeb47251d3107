"""The KV block pool as plain integers: who holds which block, and the prefix cache.

A block is in exactly one state: free, owned (by one sequence or several sharing a prefix),
reserved (for KV on its way here), pinned (being read by another instance, whoever else holds
it) or cached (nobody's, but its prefix may be asked for again).
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from engine.errors import OutOfBlocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class BlockCounts:
    free: int
    owned: int
    reserved: int
    pinned: int
    cached: int

    @property
    def available(self) -> int:
        """What can be given out now: cached prefixes give way to new owners."""
        return self.free + self.cached

    @property
    def total(self) -> int:
        return self.free + self.owned + self.reserved + self.pinned + self.cached


def blocks_for(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)


def prefix_hashes(
    tokens: Sequence[int], block_tokens: int, salt: str, known: Sequence[bytes] = ()
) -> list[bytes]:
    """A hash per full block, each chained to the one before; `known` are not computed again.

    A cryptographic hash, because a collision would answer with another prompt's KV.
    """
    hashes = list(known)
    if len(tokens) < (len(hashes) + 1) * block_tokens:
        return hashes
    previous = hashes[-1] if hashes else salt.encode()
    unhashed = array("I", tokens[len(hashes) * block_tokens :])
    block_bytes = block_tokens * unhashed.itemsize
    data = unhashed.tobytes()
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        block = data[start : start + block_bytes]
        previous = blake2b(previous + block, digest_size=16).digest()
        hashes.append(previous)
    return hashes


class BlockPool:
    def __init__(
        self, total_blocks: int, block_tokens: int, *, cache_prefixes: bool = True
    ) -> None:
        self.total_blocks = total_blocks
        self.block_tokens = block_tokens
        self._cache_prefixes = cache_prefixes
        self._free = deque(range(total_blocks))
        self._owners: Counter[int] = Counter()
        self._pins: Counter[int] = Counter()
        self._reserved: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Fresh blocks with one owner; raises OutOfBlocks and gives none if short."""
        blocks = self._take(count)
        self._owners.update(blocks)
        return blocks

    def hashes(self, tokens: Sequence[int], tenant: str) -> list[bytes]:
        """What full blocks of these tokens are found by; none where prefixes are not cached."""
        return prefix_hashes(tokens, self.block_tokens, tenant) if self._cache_prefixes else []

    def cached_prefix(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of this chain are in the pool, owned or cached."""
        for found, value in enumerate(hashes):
            if value not in self._block_of:
                return found
        return len(hashes)

    def share_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Become an owner of the longest known prefix; its blocks are read, never written."""
        blocks = [self._block_of[value] for value in hashes[: self.cached_prefix(hashes)]]
        for block in blocks:
            self._cached.pop(block, None)
            self._owners[block] += 1
        return blocks

    def remember(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Make computed full blocks findable; a prefix already known under another block stays."""
        if not self._cache_prefixes:
            return
        for block, value in zip(blocks, hashes, strict=False):
            if value not in self._block_of and block not in self._hash_of:
                self._block_of[value] = block
                self._hash_of[block] = value

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one ownership of each block, the last ones first out of the cache."""
        for block in reversed(list(blocks)):
            assert self._owners[block] > 0, f"block {block} has no owner"
            self._drop(self._owners, block)

    def reserve(self, count: int) -> list[int]:
        """Blocks for KV that is on its way; they become owned by `claim`."""
        blocks = self._take(count)
        self._reserved.update(blocks)
        return blocks

    def claim(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._reserved.remove(block)
            self._owners[block] += 1

    def unreserve(self, blocks: Iterable[int]) -> None:
        """Only after every copy into these blocks is fenced."""
        for block in blocks:
            self._reserved.remove(block)
            self._free.append(block)

    def pin(self, blocks: Iterable[int]) -> None:
        """Keep the content readable by another instance, even after its owners let go."""
        for block in blocks:
            assert self._owners[block] > 0, f"block {block} has no owner"
            self._pins[block] += 1

    def unpin(self, blocks: Iterable[int]) -> None:
        for block in reversed(list(blocks)):
            assert self._pins[block] > 0, f"block {block} is not pinned"
            self._drop(self._pins, block)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: cached blocks become free."""
        for block in list(self._cached):
            self._evict(block)
            self._free.append(block)
        self._hash_of.clear()
        self._block_of.clear()

    def counts(self) -> BlockCounts:
        pinned, reserved = len(self._pins), len(self._reserved)
        owned = sum(1 for block in self._owners if block not in self._pins)
        return BlockCounts(len(self._free), owned, reserved, pinned, len(self._cached))

    def check(self) -> None:
        """Assert that every block is in exactly one state; for tests and simulations."""
        free, held = set(self._free), self._owners.keys() | self._pins.keys()
        states = (free, held, self._reserved, self._cached.keys())
        assert len(self._free) == len(free), "a block is free twice"
        assert set().union(*states) == set(range(self.total_blocks)), "a block is lost"
        assert sum(map(len, states)) == self.total_blocks, "a block is in two states"
        assert min((*self._owners.values(), *self._pins.values()), default=1) > 0
        assert list(map(self._block_of.get, self._hash_of.values())) == list(self._hash_of)
        assert self._cached.keys() <= self._hash_of.keys(), "a cached block without a prefix"
        assert free.isdisjoint(self._hash_of), "a free block with a prefix"

    def _take(self, count: int) -> list[int]:
        if count > self.available:
            raise OutOfBlocks(count, self.available)
        while len(self._free) < count:
            oldest = next(iter(self._cached))
            self._evict(oldest)
            self._free.append(oldest)
        return [self._free.popleft() for _ in range(count)]

    def _drop(self, holders: Counter[int], block: int) -> None:
        holders[block] -= 1
        if holders[block] == 0:
            del holders[block]
        if block in self._owners or block in self._pins:
            return
        if block in self._hash_of:
            self._cached[block] = None
        else:
            self._free.append(block)

    def _evict(self, block: int) -> None:
        del self._cached[block]
        del self._block_of[self._hash_of.pop(block)]
