"""Instances in processes of their own on one device, and links between them, without Ray.

What a cluster adds to this is Ray, the doors and the policies; the gateway, the instances, the
engine and the transports are those of the cluster. Nothing is needed here that comes with Ray.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import struct
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import combinations, cycle
from typing import TYPE_CHECKING, Any, Self

from engine import wire
from engine.errors import InstanceLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from cluster.profiling.passes import Pass
    from cluster.profiling.timing import PassTimer
    from engine.messages import Message, Role
    from engine.runner import Runner

GATEWAY = "gateway-0"
BLOCK_TOKENS = 16
START_S = 900.0
LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class InstancePlan:
    name: str
    role: Role
    checkpoint: str
    device: str
    dtype: str
    kv_bytes: int
    warm_up_sequences: int
    sm_share: float | None = None
    share_weights: bool = False
    environment: dict[str, str] = field(default_factory=dict)


class SocketLink:
    """A link over one connected socket for each peer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._peers: dict[str, asyncio.StreamWriter] = {}
        self._inbox: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []

    @classmethod
    async def over(cls, name: str, sockets: dict[str, socket.socket]) -> Self:
        link = cls(name)
        for peer, one in sockets.items():
            reader, link._peers[peer] = await asyncio.open_connection(sock=one)
            link._readers.append(asyncio.create_task(link._read(peer, reader)))
        return link

    def send(self, to: str, message: Message) -> None:
        writer = self._peers.get(to)
        if writer is None or writer.is_closing():
            raise InstanceLost(f"{self.name} cannot reach {to}")
        data = wire.encode(message)
        writer.write(LENGTH.pack(len(data)) + data)

    async def receive(self) -> tuple[str, Message]:
        return await self._inbox.get()

    def connect(self, peer: str, address: str) -> None:
        raise AssertionError(f"{peer} is connected from the start, and not by {address}")

    def disconnect(self, peer: str) -> None:
        writer = self._peers.pop(peer, None)
        if writer is not None:
            writer.close()

    def close(self) -> None:
        for reader in self._readers:
            reader.cancel()
        for peer in list(self._peers):
            self.disconnect(peer)

    async def _read(self, peer: str, reader: asyncio.StreamReader) -> None:
        """Until the peer hangs up."""
        while True:
            try:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                data = await reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            self._inbox.put_nowait((peer, wire.decode(data)))


@dataclass
class InstanceProcess:
    """An instance that computes what it is told to, until it is told to serve."""

    plan: InstancePlan
    process: BaseProcess
    pipe: Connection
    metadata: bytes = b""
    blocks: int = 0
    kv_bytes_per_token: int = 0

    async def measure(self, passes: Sequence[Pass], rounds: int) -> dict[str, Any]:
        """A profile's samples of those passes that the pool holds."""
        self.pipe.send(("measure", passes, rounds))
        samples: dict[str, Any] = await self.answer()
        return samples

    @asynccontextmanager
    async def computing(self, passes: Sequence[Pass]) -> AsyncIterator[None]:
        """The same passes over and over, for as long as the context lasts."""
        self.pipe.send(("compute", passes, None))
        await self.answer()
        yield
        self.pipe.send(None)
        await self.answer()

    async def answer(self) -> Any:
        return await asyncio.to_thread(_receive, self.pipe, self.plan.name)


def _receive(pipe: Connection, name: str) -> Any:
    if not pipe.poll(START_S):
        raise InstanceLost(f"{name} does not answer")
    try:
        return pipe.recv()
    except EOFError as error:
        raise InstanceLost(f"{name} has ended") from error


@asynccontextmanager
async def started(
    plans: Sequence[InstancePlan],
) -> AsyncIterator[tuple[SocketLink, list[InstanceProcess]]]:
    """The instances, loaded and warm, and the gateway's link to them."""
    names = [GATEWAY, *(plan.name for plan in plans)]
    sockets: dict[str, dict[str, socket.socket]] = {name: {} for name in names}
    for here, there in combinations(names, 2):
        sockets[here][there], sockets[there][here] = socket.socketpair()
    instances = [_start(plan, sockets[plan.name]) for plan in plans]
    link = await SocketLink.over(GATEWAY, sockets[GATEWAY])
    try:
        for one in instances:
            one.metadata, one.blocks, one.kv_bytes_per_token = await one.answer()
        yield link, instances
    finally:
        link.close()
        for one in instances:
            one.pipe.close()
        for one in instances:
            await asyncio.to_thread(one.process.join, START_S)


def _start(plan: InstancePlan, sockets: dict[str, socket.socket]) -> InstanceProcess:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(plan, theirs, sockets), daemon=True)
    process.start()
    theirs.close()
    for one in sockets.values():
        one.close()
    return InstanceProcess(plan, process, ours)


def serve(instances: Sequence[InstanceProcess]) -> None:
    """From now on they take requests."""
    for one in instances:
        others = {o.plan.name: o.metadata for o in instances if o is not one}
        one.pipe.send(("serve", others, None))


# ---- In an instance's process.


def hold(plan: InstancePlan, pipe: Connection, sockets: dict[str, socket.socket]) -> None:
    from cluster.instance.gpu_share import limit_multiprocessors

    os.environ.update(plan.environment)
    if plan.sm_share is not None:
        limit_multiprocessors(plan.sm_share, plan.device, os.environ)
    asyncio.run(Holding(plan, pipe).run(sockets))


class Holding:
    def __init__(self, plan: InstancePlan, pipe: Connection) -> None:
        from cluster.instance.mover import rank_name
        from kvtransfer.auto import AutoTransport
        from kvtransfer.transport import Pool

        self._plan, self._pipe = plan, pipe
        self._runner = _open_runner(plan)
        kv = self._runner.kv
        self._transport = AutoTransport(rank_name(plan.name, 0), Pool.of_tensor(kv.memory, kv.fd))

    async def run(self, sockets: dict[str, socket.socket]) -> None:
        """Obeys until it is to serve, and serves until the pipe is closed."""
        from cluster.instance.mover import rank_name

        kv, layout = self._runner.kv, self._runner.layout
        per_token = layout.block_bytes(0) // layout.block_tokens
        self._pipe.send((self._transport.metadata(""), kv.blocks, per_token))
        others = self._obey()
        if others is not None:
            for name, metadata in others.items():
                self._transport.connect(rank_name(name, 0), metadata)
            await self._serve(await SocketLink.over(self._plan.name, sockets))
        self._transport.close()
        self._runner.close()

    def _obey(self) -> dict[str, bytes] | None:
        """The others' pools, once it is to serve; None if that never comes."""
        from cluster.profiling.timing import PassTimer, samples_of

        runner = self._runner
        vocab = runner.checkpoint.config.vocab
        timer = PassTimer(runner, runner.kv.blocks, BLOCK_TOKENS, vocab)
        while True:
            try:
                order, given, rounds = self._pipe.recv()
            except EOFError:
                return None
            if order == "serve":
                others: dict[str, bytes] = given
                return others
            passes = [one for one in given if timer.holds(one)]
            if order == "measure":
                seconds = timer.run(passes, rounds, lambda _: None)
                self._pipe.send(samples_of(passes, seconds))
            else:
                self._compute(timer, passes)

    def _compute(self, timer: PassTimer, passes: list[Pass]) -> None:
        """Until something else is said."""
        self._pipe.send("computing")
        for one in cycle(passes):
            if self._pipe.poll():
                break
            timer.run([one], 1, lambda _: None)
        self._pipe.send(self._pipe.recv())

    async def _serve(self, link: SocketLink) -> None:
        from cluster.instance.host import Host
        from cluster.instance.instance import Instance, InstanceSettings
        from cluster.instance.mover import InstanceMover, RankMover
        from engine.blocks import BlockPool
        from engine.clock import SystemClock

        runner, plan = self._runner, self._plan
        blocks = BlockPool(runner.kv.blocks, BLOCK_TOKENS, cache_prefixes=False)
        instance = Instance(
            plan.name,
            plan.role,
            blocks,
            runner.layout,
            settings=InstanceSettings(),
            eos=frozenset(),
        )
        async with asyncio.TaskGroup() as tasks:
            mover = InstanceMover([RankMover(runner.layout, 0, self._transport)], tasks)
            host = Host(instance, executor=runner, link=link, mover=mover, clock=SystemClock())
            running = tasks.create_task(host.run())
            host.tell([GATEWAY])
            await self._hung_up()
            running.cancel()
        link.close()

    async def _hung_up(self) -> None:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._pipe.fileno(), readable.set)
        await readable.wait()
        loop.remove_reader(self._pipe.fileno())


def _open_runner(plan: InstancePlan) -> Runner:
    from cluster.instance.warm_up import warm_up, warm_up_batches
    from engine.checkpoint import open_checkpoint
    from engine.runner import Runner
    from engine.sampler import Sampler

    checkpoint = open_checkpoint(plan.checkpoint)
    layout = checkpoint.layout(block_tokens=BLOCK_TOKENS, dtype=plan.dtype)
    runner = Runner(
        checkpoint,
        sampler=Sampler(checkpoint.config.vocab),
        device=plan.device,
        dtype=plan.dtype,
        blocks=plan.kv_bytes // layout.block_bytes(0),
        block_tokens=BLOCK_TOKENS,
        storage=_storage(plan, checkpoint) if plan.share_weights else None,
    )
    longest = checkpoint.max_length
    sequences = plan.warm_up_sequences
    batches = warm_up_batches(runner.kv.blocks, BLOCK_TOKENS, 256, sequences, longest=longest)
    warm_up(runner, batches, lambda *_: None)
    return runner


def _storage(plan: InstancePlan, checkpoint: Any) -> Any:
    import torch

    from cluster.instance.borrowed_weights import borrow_weights
    from cluster.instance.weight_memory import GpuMemory
    from engine.parallel import ALONE

    weights = borrow_weights(
        checkpoint,
        None,
        ALONE,
        dtype=plan.dtype,
        shared=GpuMemory(torch.device(plan.device)),
        device=plan.device,
        progress=lambda *_: None,
    )
    return weights.storage()
