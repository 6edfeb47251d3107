"""Resharding as arithmetic: which bytes of which source rank go where in each target rank.

Both sides compute the same plan from the two layouts and block tables, so a plan never travels.
Pieces that lie next to each other on both sides are one copy: whole runs of blocks between
equal layouts, runs of heads otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import LayoutMismatch
from engine.layout import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engine.layout import KvLayout

Offsets = NDArray[np.int64]
SAME_MODEL = ("model", "layers", "kv_heads", "head_dim", "dtype")


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Pieces of one source rank's pool and their places in one target rank's pool."""

    source_offsets: Offsets
    target_offsets: Offsets
    nbytes: Offsets

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def total_bytes(self) -> int:
        return int(self.nbytes.sum())

    def slices(self, slice_bytes: int) -> Iterator[Copies]:
        """The same copies in runs of about `slice_bytes`; longer copies are cut."""
        whole = self._cut(slice_bytes)
        if not len(whole):
            return
        number = (np.cumsum(whole.nbytes) - whole.nbytes) // slice_bytes
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(whole)], strict=True):
            run = slice(start, stop)
            yield Copies(whole.source_offsets[run], whole.target_offsets[run], whole.nbytes[run])

    def _cut(self, limit_bytes: int) -> Copies:
        """No copy longer than `limit_bytes`."""
        if not len(self) or int(self.nbytes.max()) <= limit_bytes:
            return self
        parts = -(-self.nbytes // limit_bytes)
        owner = np.repeat(np.arange(len(self)), parts)
        skipped = limit_bytes * (np.arange(len(owner)) - (np.cumsum(parts) - parts)[owner])
        return Copies(
            self.source_offsets[owner] + skipped,
            self.target_offsets[owner] + skipped,
            np.minimum(limit_bytes, self.nbytes[owner] - skipped),
        )


@dataclass(frozen=True, slots=True, eq=False)
class RankPull:
    """Everything one target rank reads from one source rank."""

    source_rank: int
    target_rank: int
    copies: Copies


@dataclass(frozen=True, slots=True, eq=False)
class RankCells:
    """What one target rank takes from one source rank, as whole blocks of some layers and heads."""

    source_rank: int
    layers: range
    heads: range
    source_blocks: list[int]
    target_blocks: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class TransferPlan:
    """The pulls of a transfer, ordered by target rank, then source rank."""

    pulls: tuple[RankPull, ...]

    def of_target(self, rank: int) -> tuple[RankPull, ...]:
        return tuple(pull for pull in self.pulls if pull.target_rank == rank)

    def of_source(self, rank: int) -> tuple[RankPull, ...]:
        return tuple(pull for pull in self.pulls if pull.source_rank == rank)

    @property
    def total_bytes(self) -> int:
        return sum(pull.copies.total_bytes for pull in self.pulls)


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """Runs of tokens that lie in one block on either side."""

    source_blocks: Offsets
    target_blocks: Offsets
    source_tokens: Offsets
    """Where in its block a piece starts."""
    target_tokens: Offsets
    tokens: Offsets

    def __len__(self) -> int:
        return len(self.tokens)

    def pick(self, chosen: NDArray[np.bool_]) -> _Pieces:
        return _Pieces(
            self.source_blocks[chosen],
            self.target_blocks[chosen],
            self.source_tokens[chosen],
            self.target_tokens[chosen],
            self.tokens[chosen],
        )


def plan_transfer(
    source: KvLayout,
    target: KvLayout,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    *,
    layers: range | None = None,
    tokens: range | None = None,
) -> TransferPlan:
    """All pulls that bring `tokens` of `layers` from the source's blocks to the target's.

    The block tables start at token 0. Blocks of equal size are copied whole; others are
    converted run by run. Without `tokens`, all of the source's table is copied.
    """
    check_compatible(source, target)
    pieces = _pieces(source, target, source_blocks, target_blocks, tokens)
    pulls: list[RankPull] = []
    for rank in range(target.ranks):
        pulls += _rank_pulls(source, target, pieces, layers, rank)
    return TransferPlan(tuple(pulls))


def plan_rank(
    source: KvLayout,
    target: KvLayout,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    rank: int,
    *,
    layers: range | None = None,
    tokens: range | None = None,
) -> tuple[RankPull, ...]:
    """The part of `plan_transfer` that one target rank carries out."""
    check_compatible(source, target)
    pieces = _pieces(source, target, source_blocks, target_blocks, tokens)
    return tuple(_rank_pulls(source, target, pieces, layers, rank))


def plan_cells(
    source: KvLayout,
    target: KvLayout,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    rank: int,
    *,
    layers: range,
) -> tuple[RankCells, ...]:
    """What `plan_rank` copies, between layouts whose blocks are equal, block by block."""
    check_compatible(source, target)
    if source.block_tokens != target.block_tokens:
        raise LayoutMismatch(
            f"block_tokens: {source.block_tokens} at the source, {target.block_tokens} here"
        )
    pieces = _pieces(source, target, source_blocks, target_blocks, None)
    return tuple(
        RankCells(
            match.source_rank,
            match.layers,
            match.heads,
            share.source_blocks.tolist(),
            share.target_blocks.tolist(),
        )
        for match, share in _matches(source, target, pieces, layers, rank)
    )


def check_compatible(source: KvLayout, target: KvLayout) -> None:
    """Different models never exchange KV; different cuts and block sizes may."""
    for field in SAME_MODEL:
        ours, theirs = getattr(source, field), getattr(target, field)
        if ours != theirs:
            raise LayoutMismatch(f"{field}: source {ours!r}, target {theirs!r}")
    for side, layout in (("source", source), ("target", target)):
        held = {head for rank in range(layout.tensor_parallel) for head in layout.rank_heads(rank)}
        if len(held) != layout.kv_heads:
            raise LayoutMismatch(
                f"tensor_parallel: {side} {layout.tensor_parallel} ranks hold only "
                f"{len(held)} of {layout.kv_heads} KV heads"
            )


def _pieces(
    source: KvLayout,
    target: KvLayout,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    tokens: range | None,
) -> _Pieces:
    if tokens is None:
        tokens = _all_tokens(source, target, len(source_blocks), len(target_blocks))
    sides = (("source", source, source_blocks), ("target", target, target_blocks))
    for side, layout, blocks in sides:
        if len(blocks) * layout.block_tokens < tokens.stop:
            raise LayoutMismatch(
                f"blocks: {side} table of {len(blocks)} blocks of {layout.block_tokens} tokens "
                f"ends before token {tokens.stop}"
            )
    if source.block_tokens == target.block_tokens:
        tokens = _whole_blocks(tokens, source.block_tokens)
    steps = (source.block_tokens, target.block_tokens)
    cuts = [np.arange(-(-tokens.start // step) * step, tokens.stop, step) for step in steps]
    starts = np.unique(np.concatenate([[tokens.start], *cuts])) if tokens else np.empty(0, np.int64)
    return _Pieces(
        np.asarray(source_blocks, np.int64)[starts // source.block_tokens],
        np.asarray(target_blocks, np.int64)[starts // target.block_tokens],
        starts % source.block_tokens,
        starts % target.block_tokens,
        np.diff(starts, append=tokens.stop),
    )


def _all_tokens(source: KvLayout, target: KvLayout, held: int, room: int) -> range:
    """What the source's blocks may hold; the end of its last one may find no room, being empty."""
    held_tokens, room_tokens = held * source.block_tokens, room * target.block_tokens
    fits = held_tokens - room_tokens < source.block_tokens
    return range(min(held_tokens, room_tokens) if fits else held_tokens)


def _whole_blocks(tokens: range, block_tokens: int) -> range:
    stop = -(-tokens.stop // block_tokens) * block_tokens
    return range(tokens.start // block_tokens * block_tokens, stop) if tokens else range(0)


@dataclass(frozen=True, slots=True)
class _Match:
    """What one target rank needs and one source rank has."""

    source: KvLayout
    target: KvLayout
    source_rank: int
    target_rank: int
    layers: range
    heads: range


def _rank_pulls(
    source: KvLayout, target: KvLayout, pieces: _Pieces, layers: range | None, rank: int
) -> Iterator[RankPull]:
    for match, share in _matches(source, target, pieces, layers, rank):
        yield RankPull(match.source_rank, rank, _copies(match, share))


def _matches(
    source: KvLayout, target: KvLayout, pieces: _Pieces, layers: range | None, rank: int
) -> Iterator[tuple[_Match, _Pieces]]:
    """Each source rank that serves this target rank, and its share of the pieces."""
    wanted = target.stage_layers(target.stage_of_rank(rank))
    if layers is not None:
        wanted = _overlap(wanted, layers)
    for source_rank in range(source.ranks):
        run = _overlap(wanted, source.stage_layers(source.stage_of_rank(source_rank)))
        heads = _overlap(target.rank_heads(rank), source.rank_heads(source_rank))
        if not run or not heads:
            continue
        match = _Match(source, target, source_rank, rank, run, heads)
        share = pieces.pick(_share(match, len(pieces)))
        if len(share):
            yield match, share


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _share(match: _Match, count: int) -> NDArray[np.bool_]:
    """Which pieces this source rank serves, when several ranks hold the same head.

    The target's holders stand in a row, each with all its pieces; the source's holders
    divide that row evenly between them.
    """
    from_ranks = _holders(match.source, match.heads.start)
    if len(from_ranks) == 1:
        return np.ones(count, np.bool_)
    to_ranks = _holders(match.target, match.heads.start)
    first = to_ranks.index(match.target_rank % match.target.tensor_parallel) * count
    server = (first + np.arange(count)) * len(from_ranks) // (len(to_ranks) * count)
    return np.equal(server, from_ranks.index(match.source_rank % match.source.tensor_parallel))


def _holders(layout: KvLayout, head: int) -> list[int]:
    """Tensor ranks that hold a head."""
    return [rank for rank in range(layout.tensor_parallel) if head in layout.rank_heads(rank)]


def _copies(match: _Match, pieces: _Pieces) -> Copies:
    token_bytes = match.source.head_dim * DTYPE_BYTES[match.source.dtype]
    (source_inner, target_inner), run_heads = _inside_block(match)
    starts = []
    for layout, rank, blocks, skipped, inner in (
        (match.source, match.source_rank, pieces.source_blocks, pieces.source_tokens, source_inner),
        (match.target, match.target_rank, pieces.target_blocks, pieces.target_tokens, target_inner),
    ):
        base = layout.offset(rank, 0, match.layers.start, value=False, head=match.heads.start)
        outer = base + blocks * layout.block_bytes(rank) + skipped * token_bytes
        starts.append((outer[:, None] + inner).ravel())
    nbytes = np.repeat(pieces.tokens * token_bytes * run_heads, len(source_inner))
    return _merged(Copies(starts[0], starts[1], nbytes))


def _inside_block(match: _Match) -> tuple[tuple[Offsets, Offsets], int]:
    """Offsets in a block of what must be copied, on both sides, and the length of a run.

    A run is counted in heads (keys or values of one layer). Dimensions are folded from the
    innermost out while they are contiguous on both sides.
    """
    source_heads = len(match.source.rank_heads(match.source_rank))
    target_heads = len(match.target.rank_heads(match.target_rank))
    head_bytes = (match.source.head_bytes, match.target.head_bytes)
    whole = head_bytes[0] == head_bytes[1]
    run, offsets = 1, (np.zeros(1, np.int64), np.zeros(1, np.int64))
    for count, strides in (
        (len(match.heads), (1, 1)),
        (2, (source_heads, target_heads)),
        (len(match.layers), (2 * source_heads, 2 * target_heads)),
    ):
        if whole and len(offsets[0]) == 1 and strides == (run, run):
            run *= count
        elif count > 1:
            offsets = (
                _repeat(offsets[0], count, strides[0] * head_bytes[0]),
                _repeat(offsets[1], count, strides[1] * head_bytes[1]),
            )
    return offsets, run


def _repeat(offsets: Offsets, count: int, stride: int) -> Offsets:
    return (np.arange(count)[:, None] * stride + offsets).ravel()


def _merged(copies: Copies) -> Copies:
    """Neighbouring copies that are contiguous on both sides made one."""
    source, target, nbytes = copies.source_offsets, copies.target_offsets, copies.nbytes
    joins = (source[1:] == source[:-1] + nbytes[:-1]) & (target[1:] == target[:-1] + nbytes[:-1])
    if not joins.any():
        return copies
    starts = np.flatnonzero(np.concatenate([[True], ~joins]))
    return Copies(source[starts], target[starts], np.add.reduceat(nbytes, starts))
