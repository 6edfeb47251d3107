"""Which instance has probably cached which prefix, judged by what was sent to it."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class PrefixIndex:
    """For each instance the chains of block hashes last sent there, oldest forgotten first.

    An instance is a bit of an integer, so one walk along a chain asks all of them at once.
    """

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._recent: dict[str, OrderedDict[bytes, None]] = {}
        self._bits: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def hits(self, chain: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of the chain that each instance holds, where it holds any."""
        depths: dict[int, int] = {}
        alive = self._holders.get(chain[0], 0) if chain else 0
        depth = 0
        while alive:
            depth += 1
            staying = self._holders.get(chain[depth], 0) & alive if depth < len(chain) else 0
            if staying != alive:
                depths[alive & ~staying] = depth
            alive = staying
        return self._by_name(depths)

    def remember(self, instance: str, chain: Sequence[bytes], capacity_blocks: int) -> None:
        """The instance has seen this chain; its ends are forgotten before its beginning."""
        bit = self._bits.get(instance) or self._new_bit(instance)
        recent, holders = self._recent[instance], self._holders
        for value in reversed(chain[:capacity_blocks]):
            if value in recent:
                recent.move_to_end(value)
            else:
                recent[value] = None
                holders[value] = holders.get(value, 0) | bit
        while len(recent) > capacity_blocks:
            oldest, _ = recent.popitem(last=False)
            self._unmark(oldest, bit)

    def forget(self, instance: str) -> None:
        bit = self._bits.pop(instance, 0)
        self._names.pop(bit, None)
        for value in self._recent.pop(instance, ()):
            self._unmark(value, bit)

    def __len__(self) -> int:
        return len(self._holders)

    def _new_bit(self, instance: str) -> int:
        free = next(1 << n for n in range(len(self._names) + 1) if 1 << n not in self._names)
        self._bits[instance], self._names[free] = free, instance
        self._recent[instance] = OrderedDict()
        return free

    def _unmark(self, value: bytes, bit: int) -> None:
        holders = self._holders[value] & ~bit
        if holders:
            self._holders[value] = holders
        else:
            del self._holders[value]

    def _by_name(self, depths: dict[int, int]) -> dict[str, int]:
        named: dict[str, int] = {}
        for mask, depth in depths.items():
            while mask:
                lowest = mask & -mask
                named[self._names[lowest]] = depth
                mask ^= lowest  # noqa: PLW2901 - the bits are taken one by one
        return named
