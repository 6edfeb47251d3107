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

    def hits(self, chain: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of the chain that each instance holds, where it holds any."""
        depths: dict[int, int] = {}
        alive = -1
        for depth, value in enumerate(chain):
            staying = self._holders.get(value, 0) & alive
            if depth and staying != alive:
                depths[alive & ~staying] = depth
            alive = staying
            if not alive:
                break
        else:
            depths[alive if chain else 0] = len(chain)
        return self._by_name(depths)

    def remember(self, instance: str, chain: Sequence[bytes], capacity_blocks: int) -> None:
        """The instance has seen this chain; its ends are forgotten before its beginning."""
        bit = self._bit(instance)
        recent = self._recent.setdefault(instance, OrderedDict())
        for value in reversed(chain[:capacity_blocks]):
            recent[value] = None
            recent.move_to_end(value)
            self._holders[value] = self._holders.get(value, 0) | bit
        while len(recent) > capacity_blocks:
            oldest, _ = recent.popitem(last=False)
            self._unmark(oldest, bit)

    def forget(self, instance: str) -> None:
        bit = self._bits.pop(instance, 0)
        for value in self._recent.pop(instance, ()):
            self._unmark(value, bit)

    def __len__(self) -> int:
        return len(self._holders)

    def _bit(self, instance: str) -> int:
        if instance not in self._bits:
            used = set(self._bits.values())
            self._bits[instance] = next(1 << n for n in range(len(used) + 1) if 1 << n not in used)
        return self._bits[instance]

    def _unmark(self, value: bytes, bit: int) -> None:
        holders = self._holders[value] & ~bit
        if holders:
            self._holders[value] = holders
        else:
            del self._holders[value]

    def _by_name(self, depths: dict[int, int]) -> dict[str, int]:
        if not any(depths):
            return {}
        return {
            name: depth
            for name, bit in self._bits.items()
            for mask, depth in depths.items()
            if mask & bit
        }
