"""Ranks that call each other directly, and a source rank in another process."""

from __future__ import annotations

import asyncio

import torch

from cluster.instance.coded import Coder, CodingSettings, slot_blocks
from cluster.instance.mover import RankMover
from engine.errors import PeerLost, TandemError
from engine.layout import KvLayout
from kvtransfer.shared_memory import shared_pool
from tests.kvtransfer.peers import TRANSPORTS, Process

SHAPE = KvLayout("m", 4, 2, 16, 8, "float32")
BLOCKS = 12
SLOT_BYTES = SHAPE.block_bytes(0)


def coding_pool():
    """Memory for the blocks of a rank and, behind them, for the slots of coded KV."""
    block_bytes = SHAPE.block_bytes(0)
    pool = shared_pool((BLOCKS + slot_blocks(8 * SLOT_BYTES, block_bytes)) * block_bytes)
    return pool, torch.from_numpy(pool.bytes())


def blocks_of(memory):
    """[block, layer, keys or values, head, token, channel]"""
    size = BLOCKS * SHAPE.block_bytes(0)
    return memory[:size].view(torch.float32).view(BLOCKS, 4, 2, 2, 8, 16)


def fill(memory, seed):
    blocks = blocks_of(memory)
    blocks.copy_(torch.randn(blocks.shape, generator=torch.Generator().manual_seed(seed)))


def coding_mover(transport, memory, *, peers=None, lease_s=600.0, link_bytes_per_s=1.0):
    """The link is so slow that coding always pays."""
    settings = CodingSettings("int8", link_bytes_per_s, lease_s)
    coder = Coder(SHAPE, 0, memory, BLOCKS, settings)
    return RankMover(SHAPE, 0, transport, peers=peers, coder=coder)


class DirectPeers:
    def __init__(self, me, movers):
        self.me = me
        self._movers = movers

    async def metadata(self, peer):
        if peer not in self._movers:
            raise PeerLost(f"{peer} is not there")
        return self._movers[peer].metadata(self.me)

    async def serve(self, peer, request):
        self._movers[peer].serve(request)

    async def stage(self, peer, request):
        return await self._movers[peer].stage(request)

    async def unstage(self, peer, ticket):
        self._movers[peer].unstage(ticket)

    async def checksum(self, peer, request):
        return await self._movers[peer].checksum(request)


class PipePeers:
    """Calls to the one rank at the other end of a pipe, one at a time."""

    def __init__(self, me, process):
        self.me = me
        self._process = process

    async def stage(self, peer, request):
        return await self._call("stage", request)

    async def unstage(self, peer, ticket):
        return await self._call("unstage", ticket)

    async def _call(self, *call):
        self._process.pipe.send(call)
        answer = await asyncio.to_thread(self._process.receive)
        if isinstance(answer, TandemError):
            raise answer
        return answer


def source_process(kind, seed):
    return Process(_hold, kind, seed)


def _hold(pipe, kind, seed):
    asyncio.run(_answer(pipe, kind, seed))


async def _answer(pipe, kind, seed):
    pool, memory = coding_pool()
    fill(memory, seed)
    transport = TRANSPORTS[kind]("source/0", pool)
    mover = coding_mover(transport, memory)
    pipe.send(mover.metadata("target/0"))
    while True:
        try:
            method, argument = await asyncio.to_thread(pipe.recv)
        except EOFError:
            break
        try:
            result = mover.unstage(argument) if method == "unstage" else await mover.stage(argument)
        except TandemError as error:
            result = error
        pipe.send(result)
    transport.close()
