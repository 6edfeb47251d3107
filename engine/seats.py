"""Which row of a device's memory each sequence has, and which rows no longer say what is so."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from engine.batch import UNREAD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.batch import Chunk
    from engine.request import Sampling


class Said(NamedTuple):
    """What a row says of a sequence."""

    token: int
    """UNREAD once a step has moved the row on, until what it drew has been read."""
    at: int
    blocks: tuple[int, ...]
    sampling: Sampling
    place: int
    """Of the next draw in the output."""


class Seats:
    def __init__(self) -> None:
        self._row_of: dict[str, int] = {}
        self._said: dict[int, Said] = {}

    def __len__(self) -> int:
        return len(self._row_of)

    def stay(self, chunks: Sequence[Chunk], rows: int) -> bool:
        """Whether nobody among the chunks sits too high for so many rows."""
        return all(self._row_of.get(chunk.request_id, 0) < rows for chunk in chunks)

    def take(
        self, chunks: Sequence[Chunk], rows: int
    ) -> tuple[list[int], list[tuple[int, Chunk | None]]]:
        """Each chunk's row below `rows`, and what must be written: sequences that are not among
        the chunks leave, and only those are moved that sit too high."""
        assert len(chunks) <= rows, (len(chunks), rows)
        left = self._leave(chunks, rows)
        free = iter(sorted(set(range(rows)) - set(self._row_of.values())))
        taken: list[int] = []
        written: list[tuple[int, Chunk | None]] = []
        for chunk in chunks:
            row = self._row_of.get(chunk.request_id)
            if row is None:
                row = self._row_of[chunk.request_id] = next(free)
            before, said = self._said.get(row), _said_by(chunk)
            if before != said:
                assert not chunk.is_unread or _differ_in_blocks(before, said), (before, said)
                self._said[row] = said
                written.append((row, chunk))
            taken.append(row)
        empty = left.difference(taken)
        return taken, written + [(row, None) for row in sorted(empty)]

    def moved_on(self, rows: Sequence[int]) -> list[Said]:
        """The device draws a token for each of these rows: what they say from then on."""
        for row in rows:
            said = self._said[row]
            self._said[row] = said._replace(token=UNREAD, at=said.at + 1, place=said.place + 1)
        return [self._said[row] for row in rows]

    def learned(self, rows: Sequence[int], left: Sequence[Said], tokens: Sequence[int]) -> None:
        """The tokens that rows were left with; those that have been moved on since, or written
        anew, say something else by now."""
        for row, said, token in zip(rows, left, tokens, strict=True):
            if self._said.get(row) is said:
                self._said[row] = said._replace(token=token)

    def clear(self) -> None:
        self._row_of.clear()
        self._said.clear()

    def _leave(self, chunks: Sequence[Chunk], rows: int) -> set[int]:
        staying = {chunk.request_id for chunk in chunks}
        gone = [name for name, row in self._row_of.items() if name not in staying or row >= rows]
        left = {self._row_of.pop(name) for name in gone}
        for row in left:
            del self._said[row]
        return left


def _said_by(chunk: Chunk) -> Said:
    assert chunk.draw is not None
    draw = chunk.draw
    return Said(chunk.tokens[0], chunk.start, chunk.blocks, draw.sampling, draw.position)


def _differ_in_blocks(before: Said | None, said: Said) -> bool:
    return before is not None and before._replace(blocks=said.blocks) == said
