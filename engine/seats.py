"""Which row of a device's memory each sequence has, and which rows no longer say what is so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.batch import Chunk
    from engine.request import Sampling

    Said = tuple[int, int, tuple[int, ...], Sampling, int]
    """Token, its position, the block table, and what the next draw depends on."""


class Seats:
    def __init__(self) -> None:
        self._row_of: dict[str, int] = {}
        self._said: dict[int, Said] = {}

    def __len__(self) -> int:
        return len(self._row_of)

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
            said = _said_by(chunk)
            if self._said.get(row) != said:
                self._said[row] = said
                written.append((row, chunk))
            taken.append(row)
        empty = left.difference(taken)
        return taken, written + [(row, None) for row in sorted(empty)]

    def moved_on(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """The device has drawn a token for each of these rows and says so."""
        for row, token in zip(rows, tokens, strict=True):
            _, at, blocks, sampling, place = self._said[row]
            self._said[row] = token, at + 1, blocks, sampling, place + 1

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
    return chunk.tokens[0], chunk.start, chunk.blocks, draw.sampling, draw.position
