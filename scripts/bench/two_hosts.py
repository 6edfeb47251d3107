"""Real hosts in processes of their own, each on one core, and a gateway here that times tokens.

What a cluster adds to this is Ray, the doors and the policies; the instance, the engine, the
transports, the links and the journal are those of the cluster.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.gateway.entry import Deliver, Fail, Reroute, Send
from cluster.gateway.journal import Journal
from cluster.zmq_link import ZmqLink, ipc_address
from engine.messages import Migrate, Migrated, Role, Token, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from engine.request import Request
    from placement.routing.router import Route

CONTEXT_TOKENS = 20480
START_S, WAIT_S = 300.0, 300.0


@dataclass(frozen=True)
class HostPlan:
    name: str
    role: Role
    checkpoint: str
    sockets: str
    blocks: int
    transport: str = "auto"
    max_rounds: int = 8
    core: int = 0


@dataclass
class HostProcess:
    plan: HostPlan
    process: BaseProcess
    pipe: Connection
    address: str = ""
    metadata: bytes = b""

    def know(self, prompt: tuple[int, ...]) -> None:
        """Puts the prompt's blocks into the prefix cache with whatever they hold: what moves
        takes as long, and nobody waits for a prefill."""
        self.pipe.send(("know", prompt))
        self.pipe.recv()

    def cpu_s(self) -> float:
        self.pipe.send(("cpu", ()))
        return float(self.pipe.recv())

    def preemptions(self) -> int:
        self.pipe.send(("preemptions", ()))
        return int(self.pipe.recv())


def write_model(shape: str, directory: Path) -> None:
    """A checkpoint of random bf16 weights that takes long prompts."""
    from scripts.bench.shapes import SHAPES, write_checkpoint

    write_checkpoint(SHAPES[shape], "bfloat16", directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": CONTEXT_TOKENS}))


def start(plans: list[HostPlan], gateway_address: str) -> list[HostProcess]:
    """Starts the hosts and introduces everybody to everybody."""
    context = multiprocessing.get_context("spawn")
    hosts = []
    for plan in plans:
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(plan, theirs))
        process.start()
        theirs.close()
        hosts.append(HostProcess(plan, process, ours))
    for host in hosts:
        assert host.pipe.poll(START_S), f"{host.plan.name} does not start"
        host.address, host.metadata = host.pipe.recv()
    for host in hosts:
        others = [(o.plan.name, o.address, o.metadata) for o in hosts if o is not host]
        host.pipe.send([("gateway-0", gateway_address, None), *others])
    return hosts


def stop(hosts: list[HostProcess]) -> None:
    for host in hosts:
        host.pipe.close()
    for host in hosts:
        host.process.join(START_S)


# ---- In a host's process.


def hold(plan: HostPlan, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {plan.core % (os.cpu_count() or 1)})
    asyncio.run(serve(plan, pipe))


async def serve(plan: HostPlan, pipe: Connection) -> None:
    """Hosts an instance until the pipe is closed."""
    from cluster.instance.host import Host
    from cluster.instance.instance import Instance, InstanceSettings
    from cluster.instance.mover import InstanceMover, RankMover, rank_name
    from engine.blocks import BlockPool
    from engine.checkpoint import open_checkpoint
    from engine.clock import SystemClock
    from engine.runner import Runner
    from engine.sampler import Sampler
    from kvtransfer.auto import AutoTransport
    from kvtransfer.transfer import TransferSettings
    from kvtransfer.transport import Pool

    checkpoint = open_checkpoint(plan.checkpoint)
    runner = Runner(checkpoint, sampler=Sampler(checkpoint.config.vocab), blocks=plan.blocks)
    pool = Pool.of_tensor(runner.kv.memory, runner.kv.fd)
    transport = AutoTransport(rank_name(plan.name, 0), pool, preference=plan.transport)
    link = ZmqLink(plan.name, ipc_address(Path(plan.sockets), plan.name), None)
    settings = InstanceSettings(transfer=TransferSettings(max_rounds=plan.max_rounds))
    blocks = BlockPool(plan.blocks, runner.layout.block_tokens)
    instance = Instance(
        plan.name, plan.role, blocks, runner.layout, settings=settings, eos=frozenset()
    )
    pipe.send((link.address, transport.metadata("")))
    for name, address, metadata in pipe.recv():
        link.connect(name, address)
        if metadata is not None:
            transport.connect(rank_name(name, 0), metadata)
    async with asyncio.TaskGroup() as tasks:
        rank = RankMover(runner.layout, 0, transport, settings.transfer.copy_share)
        mover = InstanceMover([rank], tasks)
        host = Host(instance, executor=runner, link=link, mover=mover, clock=SystemClock())
        running = tasks.create_task(host.run())
        host.tell(["gateway-0"])
        await obey(pipe, instance, blocks)
        running.cancel()
    link.close()
    transport.close()
    runner.close()


async def obey(pipe: Connection, instance: Any, blocks: Any) -> None:
    """What the bench asks for, until it hangs up."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(pipe.fileno(), readable.set)
    while True:
        await readable.wait()
        readable.clear()
        if not pipe.poll():
            continue
        try:
            order, prompt = pipe.recv()
        except EOFError:
            loop.remove_reader(pipe.fileno())
            return
        if order == "know":
            remember(blocks, prompt)
        pipe.send(instance.preemptions if order == "preemptions" else time.process_time())


def remember(blocks: Any, prompt: tuple[int, ...]) -> None:
    from engine.blocks import prefix_hashes

    hashes = prefix_hashes(prompt, blocks.block_tokens, "")
    held = blocks.allocate(len(hashes))
    blocks.remember(held, hashes)
    blocks.release(held)


# ---- The gateway.


@dataclass
class Stream:
    """When each token of one request came, and from whom."""

    arrived_s: list[float] = field(default_factory=list)
    senders: list[str] = field(default_factory=list)
    stamps: dict[str, float] = field(default_factory=dict)


class Gateway:
    """A journal on a link, and the moments of everything that arrives while one waits."""

    def __init__(self, sockets: Path) -> None:
        self.link = ZmqLink("gateway-0", ipc_address(sockets, "gateway-0"), None)
        self.streams: dict[str, Stream] = {}
        self.steps_s: dict[str, list[float]] = {}
        self.ended: dict[str, Migrated] = {}
        self._journal = Journal()

    def meet(self, hosts: list[HostProcess]) -> None:
        for host in hosts:
            self.link.connect(host.plan.name, host.address)

    def open(self, request: Request, route: Route) -> Stream:
        self.streams[request.id] = Stream()
        self._carry_out(self._journal.open(request, route, time.monotonic()))
        return self.streams[request.id]

    def abort(self, request_id: str) -> None:
        self._carry_out(self._journal.abort(request_id))

    def migrate(self, request_id: str, source: str, target: str) -> None:
        self.link.send(source, Migrate(request_id, target, "bench"))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await self._next()

    async def _next(self) -> None:
        sender, message = await self.link.receive()
        now = time.monotonic()
        if isinstance(message, Tokens):
            self.steps_s.setdefault(sender, []).append(now)
            for token in message.tokens:
                self._note(sender, token, now)
        if isinstance(message, Migrated):
            self.ended[message.request_id] = message
        self.heard(message)
        self._carry_out(self._journal.receive(sender, message, now))

    def heard(self, message: object) -> None:
        """For gateways that decide by what they hear."""

    async def listen(self, seconds: float) -> None:
        """Takes in what comes, for so long."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            await self._next()

    async def tokens(self, stream: Stream, count: int) -> None:
        wanted = len(stream.arrived_s) + count
        await self.until(lambda: len(stream.arrived_s) >= wanted)

    def _note(self, sender: str, token: Token, now: float) -> None:
        stream = self.streams.get(token.request_id)
        if stream is not None:
            stream.arrived_s.append(now)
            stream.senders.append(sender)
            stream.stamps.update(token.stamps)

    def _carry_out(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    self.link.send(to, message)
                case Reroute() | Fail():
                    raise AssertionError(f"nothing should fail here: {action}")
                case Deliver():
                    continue
