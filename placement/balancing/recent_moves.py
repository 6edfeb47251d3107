"""What a balancer has proposed lately and the view may not show yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.messages import Running
    from placement.view import View

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class UnderWay:
    source: str
    target: str
    blocks: int
    """That the target has to find."""
    leaves_blocks: int
    since_s: float


class RecentMoves:
    def __init__(self, moves_a_minute: int, patience_s: float) -> None:
        self._moves_a_minute, self._patience_s = moves_a_minute, patience_s
        self._under_way: dict[str, UnderWay] = {}
        self._arrived: set[str] = set()
        """Requests whose target already counts their blocks in its load."""
        self._at_s: dict[str, deque[float]] = {}

    def look(self, view: View) -> None:
        """Forgets what has ended, and what has had its time."""
        holders: dict[str, dict[str, int]] = {}
        for seen in view.instances:
            for one in seen.load.sequences:
                holders.setdefault(one.request_id, {})[seen.id] = one.blocks
        for request_id, move in list(self._under_way.items()):
            there = holders.get(request_id, {})
            late = view.now_s - move.since_s > self._patience_s
            if move.source not in there or (late and move.target not in there):
                self.ended(request_id)
        self._arrived = {
            name
            for name, move in self._under_way.items()
            if holders.get(name, {}).get(move.target, 0) > 0
        }
        self._expire(view.now_s)

    def began(self, one: Running, source: str, target: str, blocks: int, now: float) -> None:
        self._under_way[one.request_id] = UnderWay(source, target, blocks, one.blocks, now)
        self._at_s.setdefault(one.request_id, deque()).append(now)

    def ended(self, request_id: str) -> None:
        self._under_way.pop(request_id, None)

    def may_move(self, one: Running, now: float, *, always: bool = False) -> bool:
        """Not while it moves, and not more often than allowed unless it must."""
        if one.request_id in self._under_way:
            return False
        lately = [at for at in self._at_s.get(one.request_id, ()) if now - at < MINUTE_S]
        return always or len(lately) < self._moves_a_minute

    def from_(self, source: str) -> dict[str, UnderWay]:
        return {name: move for name, move in self._under_way.items() if move.source == source}

    def to(self, target: str) -> dict[str, UnderWay]:
        return {name: move for name, move in self._under_way.items() if move.target == target}

    def between(self, source: str, target: str) -> int:
        return sum(move.target == target for move in self.from_(source).values())

    def expected_blocks(self, target: str) -> int:
        """Set aside at the target for what it does not show yet."""
        return sum(
            move.blocks
            for name, move in self._under_way.items()
            if move.target == target and name not in self._arrived
        )

    def leaving_blocks(self, source: str) -> int:
        return sum(move.leaves_blocks for move in self.from_(source).values())

    def _expire(self, now: float) -> None:
        for request_id, moments in list(self._at_s.items()):
            while moments and now - moments[0] >= MINUTE_S:
                moments.popleft()
            if not moments:
                del self._at_s[request_id]
