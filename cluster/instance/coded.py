"""Pulls that are coded for a slow link: the source codes into a slot, the target decodes from one.

Slots lie behind the blocks of either pool, so that transports reach them like blocks. A slot is
lent for a bounded time, and a target uses what it has pulled only after the source has said that
it still held the slot.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.errors import LeaseExpired, TransportError
from engine.kvcache import TORCH_DTYPES
from kvtransfer.coding import Coding, CodingSpeed, choose_coding
from kvtransfer.compression import CODECS, Staging, find_codec
from kvtransfer.plan import Copies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from engine.layout import KvLayout
    from kvtransfer.plan import RankCells
    from kvtransfer.transfer import PullOrder

log = logging.getLogger(__name__)

SLOTS = 4
"""In either direction: one is moved while others are coded."""
PROBE_BLOCKS = 8
WORTH_MEASURING_BYTES = 1 << 20
NEWEST_WEIGHT = 0.3


@dataclass(frozen=True, slots=True)
class CodingSettings:
    wanted: str
    """A codec, or auto."""
    link_Bps: float | None = None  # noqa: N815  a unit
    """What is known of every link; measured from the pulls themselves if not given."""
    lease_s: float = 3.0
    """How long a coded piece waits for its target."""


@dataclass(frozen=True, slots=True)
class StageRequest:
    codec: str
    blocks: tuple[int, ...]
    tokens: int
    first_layer: int
    last_layer: int
    first_head: int
    last_head: int


@dataclass(frozen=True, slots=True)
class Staged:
    ticket: int
    offset: int
    """In the source's pool."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class CodedPiece:
    """Some blocks of a part, as many as a slot holds coded."""

    request: StageRequest
    target_blocks: list[int]


@dataclass(slots=True)
class _Lent:
    slot: int
    timer: asyncio.TimerHandle = field(repr=False)


class Coder:
    """Both parts of a rank: coding what others pull, and decoding what it pulls itself."""

    def __init__(
        self,
        layout: KvLayout,
        rank: int,
        memory: torch.Tensor,
        blocks: int,
        settings: CodingSettings,
    ) -> None:
        """`memory` holds `blocks` blocks and then the slots."""
        self._layout, self._rank, self._settings = layout, rank, settings
        self._blocks = blocks
        self._pool = memory[: blocks * layout.block_bytes(rank)]
        self._slots = memory[self._pool.numel() :].view(2 * SLOTS, -1)
        self._speeds = {name: coding_speed(layout, rank, name, memory.device) for name in CODECS}
        self._outgoing: asyncio.Queue[int] = _filled(range(SLOTS))
        self._incoming: asyncio.Queue[int] = _filled(range(SLOTS, 2 * SLOTS))
        self._tickets = itertools.count()
        self._lent: dict[int, _Lent] = {}
        self._link_Bps: dict[str, float] = {}
        self._last: dict[str, str | None] = {}

    # Choosing.

    def choose(self, source: str, nbytes: int, *, two_sided: bool) -> str | None:
        """The codec for a pull from this instance; the log tells each change of mind."""
        if two_sided:
            coding = Coding(None, "the transport needs both sides")
        else:
            link_Bps = self._settings.link_Bps or self._link_Bps.get(source)  # noqa: N806
            coding = choose_coding(self._settings.wanted, nbytes, link_Bps, self._speeds)
        if source not in self._last or self._last[source] != coding.codec:
            self._last[source] = coding.codec
            verb = "declined" if coding.codec is None else "chosen"
            log.info(
                "compression %s source=%s codec=%s why=%s", verb, source, coding.codec, coding.why
            )
        return coding.codec

    def measured(self, source: str, nbytes: int, seconds: float) -> None:
        """A pull went over the link to this instance."""
        if nbytes < WORTH_MEASURING_BYTES:
            return
        found = nbytes / max(seconds, 1e-6)
        known = self._link_Bps.get(source, found)
        self._link_Bps[source] = known + NEWEST_WEIGHT * (found - known)

    def forget(self, source: str) -> None:
        self._link_Bps.pop(source, None)
        self._last.pop(source, None)

    # The source's part.

    async def stage(self, request: StageRequest) -> Staged:
        staging = self._staging_of(request)
        nbytes = len(request.blocks) * staging.block_bytes
        slot = await self._lend()
        try:
            await asyncio.to_thread(self._encode, staging, request, slot)
        except BaseException:
            self._outgoing.put_nowait(slot)
            raise
        ticket = next(self._tickets)
        timer = asyncio.get_running_loop().call_later(
            self._settings.lease_s, self._take_back, ticket
        )
        self._lent[ticket] = _Lent(slot, timer)
        return Staged(ticket, self._offset(slot), nbytes)

    def unstage(self, ticket: int) -> None:
        """The target has pulled it; LeaseExpired if the slot may have been used again before."""
        if ticket not in self._lent:
            raise LeaseExpired(f"a coded piece waited longer than {self._settings.lease_s:g} s")
        self._lent[ticket].timer.cancel()
        self._take_back(ticket)

    async def _lend(self) -> int:
        try:
            async with asyncio.timeout(self._settings.lease_s):
                return await self._outgoing.get()
        except TimeoutError as error:
            raise TransportError("transfer.staging_bytes: every slot is taken") from error

    def _take_back(self, ticket: int) -> None:
        self._outgoing.put_nowait(self._lent.pop(ticket).slot)

    def _encode(self, staging: Staging, request: StageRequest, slot: int) -> None:
        staging.encode(self._pool, list(request.blocks), request.tokens, self._slots[slot])
        _settle(self._pool)

    def _staging_of(self, request: StageRequest) -> Staging:
        layout = self._layout
        layers = range(request.first_layer, request.last_layer)
        heads = range(request.first_head, request.last_head)
        stage = layout.stage_layers(layout.stage_of_rank(self._rank))
        ours = layout.rank_heads(self._rank)
        if not _within(layers, stage) or not _within(heads, ours):
            raise TransportError(f"layers {layers} and heads {heads}: here are {stage} and {ours}")
        if not request.blocks or not all(0 <= block < self._blocks for block in request.blocks):
            raise TransportError(f"blocks {request.blocks}: the pool has {self._blocks}")
        behind = len(request.blocks) * layout.block_tokens - request.tokens
        if not 0 <= behind < layout.block_tokens:
            held = len(request.blocks)
            raise TransportError(f"tokens {request.tokens}: not what {held} blocks hold")
        if request.codec not in CODECS:
            raise TransportError(f"codec {request.codec!r}: unknown here")
        staging = Staging(layout, self._rank, layers, heads, find_codec(request.codec))
        if len(request.blocks) * staging.block_bytes > self._slots.shape[1]:
            raise TransportError(f"{len(request.blocks)} coded blocks: a slot holds fewer")
        return staging

    # The target's part.

    def pieces(self, part: RankCells, order: PullOrder, codec: str) -> Iterator[CodedPiece]:
        """What one slot holds at a time."""
        step = self._slots.shape[1] // self._staging(part, codec).block_bytes
        block_tokens = self._layout.block_tokens
        tokens = len(part.source_blocks) * block_tokens
        if part.target_blocks[-1] == order.target_blocks[-1]:
            tokens -= len(order.target_blocks) * block_tokens - order.tokens
        for start in range(0, len(part.source_blocks), step):
            blocks = tuple(part.source_blocks[start : start + step])
            held = min(len(blocks) * block_tokens, tokens - start * block_tokens)
            request = StageRequest(
                codec,
                blocks,
                held,
                part.layers.start,
                part.layers.stop,
                part.heads.start,
                part.heads.stop,
            )
            yield CodedPiece(request, part.target_blocks[start : start + step])

    async def borrow(self) -> int:
        return await self._incoming.get()

    def give_back(self, slot: int) -> None:
        self._incoming.put_nowait(slot)

    def copies(self, staged: Staged, slot: int) -> Copies:
        if not 0 < staged.nbytes <= self._slots.shape[1]:
            holds = self._slots.shape[1]
            raise TransportError(f"{staged.nbytes} coded bytes: a slot holds {holds}")
        numbers = (staged.offset, self._offset(slot), staged.nbytes)
        return Copies(*(np.array([number], np.int64) for number in numbers))

    def decode(self, part: RankCells, piece: CodedPiece, slot: int) -> None:
        staging = self._staging(part, piece.request.codec)
        staging.decode(self._slots[slot], piece.target_blocks, self._pool)
        _settle(self._pool)

    def _staging(self, part: RankCells, codec: str) -> Staging:
        return Staging(self._layout, self._rank, part.layers, part.heads, find_codec(codec))

    def _offset(self, slot: int) -> int:
        return self._pool.numel() + slot * self._slots.shape[1]


def slot_blocks(staging_bytes: int, block_bytes: int) -> int:
    """Blocks to add to a pool for all slots; each slot holds at least one."""
    return 2 * SLOTS * max(1, staging_bytes // (2 * SLOTS * block_bytes))


def coding_speed(layout: KvLayout, rank: int, codec: str, device: torch.device) -> CodingSpeed:
    """Measured on a few blocks."""
    layers, heads = layout.stage_layers(layout.stage_of_rank(rank)), layout.rank_heads(rank)
    staging = Staging(layout, rank, layers, heads, find_codec(codec))
    nbytes = PROBE_BLOCKS * layout.block_bytes(rank)
    dtype = TORCH_DTYPES[layout.dtype]
    values = torch.linspace(-1.0, 1.0, nbytes // dtype.itemsize, device=device)
    memory = values.to(dtype).view(torch.uint8)
    wire = torch.empty(PROBE_BLOCKS * staging.block_bytes, dtype=torch.uint8, device=device)
    blocks, tokens = list(range(PROBE_BLOCKS)), PROBE_BLOCKS * layout.block_tokens
    encode_s = _shortest_s(lambda: staging.encode(memory, blocks, tokens, wire), memory)
    decode_s = _shortest_s(lambda: staging.decode(wire, blocks, memory), memory)
    return CodingSpeed(wire.numel() / nbytes, nbytes / encode_s, nbytes / decode_s)


def _shortest_s(work: Callable[[], None], memory: torch.Tensor) -> float:
    taken = []
    for _ in range(2):
        began_s = time.perf_counter()
        work()
        _settle(memory)
        taken.append(time.perf_counter() - began_s)
    return min(taken)


def _within(part: range, whole: range) -> bool:
    return whole.start <= part.start < part.stop <= whole.stop


def _filled(slots: range) -> asyncio.Queue[int]:
    queue: asyncio.Queue[int] = asyncio.Queue()
    for slot in slots:
        queue.put_nowait(slot)
    return queue


def _settle(memory: torch.Tensor) -> None:
    """What this thread told a GPU to write is there when this returns. The whole device is not
    waited for, which CUDA forbids while another thread records a graph."""
    if memory.is_cuda:
        torch.cuda.current_stream(memory.device).record_event().synchronize()
