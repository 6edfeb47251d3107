"""The real instances and journals in a seeded world: one generator, one heap of events.

Everything that can happen is an event at a virtual time. After each one the pool it touched
must balance; every delivered token is compared with what the model must say; and once the
faults have healed, every request must have ended and every pool be back at its baseline.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from random import Random
from typing import TYPE_CHECKING

from cluster.instance.instance import Instance, InstanceSettings
from decode.scheduler import DecodeSettings
from engine import wire
from engine.errors import (
    BadLogits,
    ChecksumMismatch,
    PeerLost,
    PoisonRequest,
    TransferError,
    TransportError,
)
from engine.messages import Confirmed, Lost, Message, Migrate, Migrated, Role
from engine.request import Request, Sampling
from engine.slo import Slo
from kvtransfer.transfer import PullCancel, PullOrder, TransferSettings
from placement.role import RoleSettings
from placement.routing.router import Route
from prefill.scheduler import PrefillSettings
from tests.simulation import faults as fault
from tests.simulation.gateway import SimulatedGateway
from tests.simulation.model import EOS, FakeModel, expected_output, layout
from tests.simulation.watched_pool import WatchedPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.batch import Batch, StepResult

LOAD_S, TICK_S = 0.25, 0.1
DECLINED = 0.1
"""Of the batches that might run ahead, as for want of a graph."""
FAULTS_END_S = 12.0
EVERYTHING_ENDS_S = 120.0
GROUPS = 2


@dataclass(eq=False)
class Flight:
    """A batch that a node's device was given, and what the host knows of it."""

    batch: Batch
    declined: bool = False
    begun: bool = False
    result: StepResult | None = None
    heard: bool = False


@dataclass(eq=False)
class Node:
    """One life of an instance: its decider, its memory, and the copies on their way to it."""

    instance: Instance
    model: FakeModel
    flights: list[Flight] = field(default_factory=list)
    """The batch under way, and the one behind it."""
    preemptions: int = 0
    compares: bool = False
    pulls: dict[tuple[str, int], PullOrder] = field(default_factory=dict)


class World:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self._device_rng = Random(f"devices {seed}")
        """Worlds whose nodes do not run ahead are the same with and without it."""
        self._runs_ahead = self._drawn_runs_ahead()
        self.now = 0.0
        self.faults = self._drawn_faults()
        self.block_tokens = self.rng.choice((2, 4))
        self._step_s = self.rng.choice((0.005, 0.02, 0.05))
        self.nodes: dict[str, Node] = {}
        self.gateways: dict[str, SimulatedGateway] = {}
        self.trace = blake2b(digest_size=16)
        self.events = 0
        self.met = {
            "commits": 0,
            "migrations": 0,
            "deaths": 0,
            "preemptions": 0,
            "swaps": 0,
            "poisoned": 0,
            "mismatches": 0,
            "ahead": 0,
            "outrun": 0,
        }
        self._poison: set[str] = set()
        self._lethal: set[str] = set()
        self._heap: list[tuple[float, int, str, Callable[[], None]]] = []
        self._serial = 0
        self._roles = self._drawn_roles()
        for name in self._roles:
            self._boot(name)
        for number in range(self._drawn_gateways()):
            self._boot_gateway(f"gateway-{number}")
        self._schedule_faults()

    # What chance decides about a world, once.

    def _drawn_faults(self) -> fault.Faults:
        return fault.drawn(self.rng)

    def _drawn_runs_ahead(self) -> bool:
        return self._device_rng.random() < 0.5

    def _drawn_logprobs(self) -> int | None:
        """Who asks for them is drawn by the host, and no batch runs ahead of that."""
        return 0 if self._runs_ahead and self._device_rng.random() < 0.1 else None

    def _drawn_gateways(self) -> int:
        return self.rng.choice((1, 1, 2))

    def _drawn_roles(self) -> dict[str, Role]:
        if self.rng.random() < 0.25:
            return {f"mixed-{n}": Role.MIXED for n in range(self.rng.choice((1, 2, 3)))}
        prefills = {f"prefill-{n}": Role.PREFILL for n in range(self.rng.choice((1, 2)))}
        decodes = {f"decode-{n}": Role.DECODE for n in range(self.rng.choice((1, 2, 3)))}
        return prefills | decodes

    def _drawn_settings(self) -> InstanceSettings:
        rng = self.rng
        return InstanceSettings(
            role=RoleSettings(
                prefill=PrefillSettings(
                    token_budget=rng.choice((4, 16, 64)), policy=rng.choice(("deadline", "fcfs"))
                ),
                decode=DecodeSettings(
                    max_sequences=rng.choice((2, 4, 16)),
                    host_slots=rng.choice((0, 8, 32)),
                    recompute_budget=rng.choice((1, 8, 64)),
                ),
                min_chunk=rng.choice((1, 8)),
            ),
            transfer=TransferSettings(
                layer_groups=GROUPS,
                piece_bytes=rng.choice((0, 8 << 10)),
                max_rounds=rng.choice((1, 3, 8)),
                max_offers=rng.choice((2, 64)),
                checksums=rng.random() < 0.5,
            ),
        )

    def _drawn_blocks(self, name: str) -> int:
        return self.rng.choice((16, 20, 64))

    # Time.

    def after(self, delay_s: float, label: str, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._serial, label, action))

    def run(self) -> None:
        """Raises AssertionError when an invariant breaks."""
        self._submit_requests()
        while self.now < FAULTS_END_S or self._busy():
            assert self.now < EVERYTHING_ENDS_S, self._unfinished()
            self._next_event()
        for gateway in self.gateways.values():
            bad = self._poison | self._lethal
            assert not bad & gateway.finished.keys()
            self.met["poisoned"] += sum(
                error == PoisonRequest.__name__ for error in gateway.failed.values()
            )
        for node in self.nodes.values():
            counts = node.instance.pool.counts()
            assert counts.available == node.instance.pool.total_blocks, (
                f"{node.instance.name} keeps {counts}"
            )

    def _next_event(self) -> None:
        self.now, serial, label, action = heapq.heappop(self._heap)
        self.trace.update(f"{self.now:.9f} {serial} {label}\n".encode())
        self.events += 1
        if self.now >= FAULTS_END_S:
            self.faults = fault.NONE
        action()

    def _busy(self) -> bool:
        waiting = any(len(gateway) for gateway in self.gateways.values())
        return waiting or any(self._holds_something(node) for node in self.nodes.values())

    def _holds_something(self, node: Node) -> bool:
        counts = node.instance.pool.counts()
        return counts.available != node.instance.pool.total_blocks or bool(
            node.instance.load().sequences
        )

    def _unfinished(self) -> str:
        stuck = [g.describe() for g in self.gateways.values()]
        held = {n: (v.instance.pool.counts(), v.instance.load()) for n, v in self.nodes.items()}
        return f"seed {self.seed}: not all ended: {stuck} {held}"

    # Messages.

    def send(self, sender: str, to: str, message: Message) -> None:
        if self.rng.random() < self.faults.lose:
            return
        copies = 2 if self.rng.random() < self.faults.repeat else 1
        data = wire.encode(message)
        for _ in range(copies):
            slow = self.rng.random() < self.faults.slow_link
            delay_s = self.rng.uniform(0.0, 1.0) if slow else self.rng.uniform(0.0001, 0.002)
            label = f"{sender}>{to} {type(message).__name__}"
            self.after(delay_s, label, lambda: self._deliver(sender, to, data))

    def _deliver(self, sender: str, to: str, data: bytes) -> None:
        message = wire.decode(data)
        self.met["commits"] += isinstance(message, Confirmed)
        if isinstance(message, Migrated):
            self.met["migrations"] += message.outcome == "committed"
        if to in self.gateways:
            self.gateways[to].receive(sender, message)
        elif to in self.nodes:
            node = self.nodes[to]
            node.instance.receive(sender, message, self.now)
            self._pump(node)

    # Instances.

    def _boot(self, name: str) -> None:
        settings = self._drawn_settings()
        node = self._node(name, settings, self._drawn_blocks(name))
        self.nodes[name] = node
        self.after(self.rng.uniform(0, TICK_S), f"tick {name}", lambda: self._tick(node))
        self.after(0.0, f"load {name}", lambda: self._tell_load(node))

    def _node(self, name: str, settings: InstanceSettings, blocks: int) -> Node:
        pool, eos = WatchedPool(blocks, self.block_tokens), frozenset((EOS,))
        shape = layout(self.block_tokens)
        instance = Instance(name, self._roles[name], pool, shape, settings=settings, eos=eos)
        model = FakeModel(self.block_tokens)
        return Node(instance, model, compares=settings.transfer.checksums)

    def alive(self, node: Node) -> bool:
        return self.nodes.get(node.instance.name) is node

    def _tick(self, node: Node) -> None:
        if self.alive(node):
            node.instance.tick(self.now)
            self._pump(node)
            self.after(TICK_S, f"tick {node.instance.name}", lambda: self._tick(node))

    def _tell_load(self, node: Node) -> None:
        if self.alive(node):
            load = node.instance.load()
            for gateway in self.gateways:
                self.send(node.instance.name, gateway, load)
            self.after(LOAD_S, f"load {node.instance.name}", lambda: self._tell_load(node))

    def _pump(self, node: Node) -> None:
        """What the host does after every event: copies, messages, and the next step."""
        for order in node.instance.take_pulls():
            if isinstance(order, PullCancel):
                self._cancel_pulls(node, order.transfer)
            else:
                self._start_pull(node, order)
        batch = self._next_batch(node)
        if batch is not None:
            self._launch(node, batch)
        for envelope in node.instance.take_outbox():
            self.send(node.instance.name, envelope.to, envelope.message)
        node.instance.pool.check()

    def _next_batch(self, node: Node) -> Batch | None:
        if not node.flights:
            return node.instance.next_batch(self.now)
        return node.instance.next_ahead(self.now) if self._runs_ahead else None

    def _launch(self, node: Node, batch: Batch) -> None:
        """A batch behind another one waits for it, if its device takes it at all."""
        ahead = bool(node.flights)
        flight = Flight(batch, declined=ahead and self._device_rng.random() < DECLINED)
        self.met["ahead"] += ahead and not flight.declined
        node.flights.append(flight)
        self._start_next(node)

    def _start_next(self, node: Node) -> None:
        for flight in node.flights:
            if not flight.begun and not flight.declined:
                self._start_step(node, flight)
            if flight.result is None:
                return

    def _start_step(self, node: Node, flight: Flight) -> None:
        flight.begun, batch = True, flight.batch
        self.met["swaps"] += len(batch.swaps)
        node.model.swap(batch.swaps)
        duration_s = self._step_s + 0.0005 * batch.tokens * self.rng.uniform(0.8, 1.2)
        groups = layout(self.block_tokens).layer_groups(0, GROUPS)
        for number, layers in enumerate(groups):
            at = duration_s * (number + 1) / (GROUPS + 1)
            self.after(
                at,
                f"group {node.instance.name}",
                lambda n=number, ls=layers: self._group(node, batch, n, ls),
            )
        label = f"step {node.instance.name}"
        self.after(duration_s, label, lambda: self._end_step(node, flight, duration_s))

    def _group(self, node: Node, batch: Batch, number: int, layers: range) -> None:
        if self.alive(node):
            node.model.compute(batch, layers)
            node.instance.layer_group_done(number, self.now)
            self._pump(node)

    def _end_step(self, node: Node, flight: Flight, duration_s: float) -> None:
        """The device goes on at once; a host that runs ahead hears of it some time later."""
        if not self.alive(node):
            return
        flight.result = node.model.draw(flight.batch, duration_s)
        if self._runs_ahead:
            self._start_next(node)
            delay_s = self._device_rng.uniform(0.0, self._step_s)
            self.after(delay_s, f"heard {node.instance.name}", lambda: self._hear(node, flight))
        else:
            self._hear(node, flight)

    def _hear(self, node: Node, flight: Flight) -> None:
        flight.heard = True
        while self.alive(node) and node.flights and self._is_over(node):
            self._finish_step(node)
            if self.alive(node):
                self._pump(node)

    def _is_over(self, node: Node) -> bool:
        """Whether the host has heard of the first batch; if that failed, of the one behind, too."""
        first, *behind = node.flights
        fails = bool(self._names_in(first) & self._poison)
        return first.heard and not (fails and any(not (b.heard or b.declined) for b in behind))

    def _finish_step(self, node: Node) -> None:
        self.met["preemptions"] += node.instance.preemptions - node.preemptions
        node.preemptions = node.instance.preemptions
        first, *behind = node.flights
        names = self._names_in(first)
        if names & self._lethal:
            self.kill(node.instance.name, detected_s=0.3, again_s=0.6)
            return
        fails = bool(names & self._poison)
        if not fails:
            assert first.result is not None
            node.instance.finish(first.batch, first.result, self.now)
            self.met["outrun"] += len(node.instance._residents._doomed)
        node.flights = [] if fails else behind
        for flight in behind:
            if fails or flight.declined:
                node.instance.discard(flight.batch)
                node.flights = []
        if fails:
            node.instance.fail_batch(first.batch, BadLogits("not finite"), self.now)

    def _names_in(self, flight: Flight) -> set[str]:
        return {chunk.request_id for chunk in flight.batch.chunks}

    # Copies.

    def _start_pull(self, node: Node, order: PullOrder) -> None:
        source = self.nodes.get(order.source)
        key = (order.transfer, order.number)
        node.pulls[key] = order
        took_s = self._pull_s(len(order.source_blocks))
        label = f"pull {order.source}>{node.instance.name}"
        self.after(took_s, label, lambda: self._finish_pull(node, source, key))

    def _pull_s(self, blocks: int) -> float:
        return 0.001 + 0.001 * blocks * self.rng.uniform(0.2, 3.0)

    def _finish_pull(self, node: Node, source: Node | None, key: tuple[str, int]) -> None:
        """Blocks are read at the latest moment, so that freeing them early would show."""
        if not self.alive(node) or key not in node.pulls:
            return
        order = node.pulls[key]
        error: TransferError | None = None
        if source is None or not self.alive(source):
            error = PeerLost(f"{order.source} is gone")
        elif self._pull_breaks():
            error = TransportError("the link broke")
        elif order.compare:
            error = self._compare_blocks(node, source, order)
        else:
            self._copy(node, source, order)
            self._corrupt(node, order)
        self._end_pull(node, key, error)

    def _pull_breaks(self) -> bool:
        return self.rng.random() < self.faults.pull_error

    def _copy(self, node: Node, source: Node, order: PullOrder) -> None:
        blocks = list(zip(order.source_blocks, order.target_blocks, strict=True))
        layers = range(order.first_layer, order.last_layer)
        node.model.copy_from(source.model, blocks, layers)

    def _compare_blocks(self, node: Node, source: Node, order: PullOrder) -> TransferError | None:
        for theirs, mine in zip(order.source_blocks, order.target_blocks, strict=True):
            if source.model.block(theirs) != node.model.block(mine):
                self.met["mismatches"] += 1
                return ChecksumMismatch(f"block {theirs} of {order.source}")
        return None

    def _corrupt(self, node: Node, order: PullOrder) -> None:
        """A link that is not trusted alters what it carries; without checksums it must not."""
        if node.compares and self.rng.random() < self.faults.corrupt:
            block = self.rng.choice(order.target_blocks)
            layer = self.rng.randrange(order.first_layer, order.last_layer)
            node.model.corrupt(block, layer)

    def _cancel_pulls(self, node: Node, transfer: str) -> None:
        """A cancelled copy may still write until its end is reported."""
        for key, order in list(node.pulls.items()):
            if order.transfer == transfer:
                source = self.nodes.get(order.source)
                delay_s = self.rng.uniform(0.0, 0.05)
                label = f"fence {node.instance.name}"
                self.after(delay_s, label, lambda k=key, s=source: self._fence(node, s, k))

    def _fence(self, node: Node, source: Node | None, key: tuple[str, int]) -> None:
        if not self.alive(node) or key not in node.pulls:
            return
        if source is not None and not node.pulls[key].compare and self.rng.random() < 0.5:
            self._copy(node, source, node.pulls[key])
        self._end_pull(node, key, TransportError("cancelled"))

    def _end_pull(self, node: Node, key: tuple[str, int], error: TransferError | None) -> None:
        order = node.pulls.pop(key)
        node.instance.pull_finished(order.transfer, order.number, error, self.now)
        self._pump(node)

    # Faults.

    def _schedule_faults(self) -> None:
        self._repeatedly(self.faults.kill_instance_per_s, "kill", self._kill_instance)
        self._repeatedly(self.faults.kill_gateway_per_s, "kill gateway", self._kill_gateway)
        self._repeatedly(self.faults.migrate_per_s, "migrate", self._migrate)
        self._repeatedly(self.faults.drain_per_s, "drain", self._drain)
        self._repeatedly(self.faults.switch_role_per_s, "switch role", self._switch_role)

    def _repeatedly(self, rate_per_s: float, label: str, action: Callable[[], None]) -> None:
        def happen() -> None:
            if self.now < FAULTS_END_S:
                action()
                self.after(self.rng.expovariate(rate_per_s), label, happen)

        if rate_per_s:
            self.after(self.rng.expovariate(rate_per_s), label, happen)

    def _kill_instance(self) -> None:
        if not self.nodes:
            return
        name = self.rng.choice(list(self.nodes))
        late = self.rng.random() < self.faults.slow_detection
        detected_s = self.rng.uniform(1.0, 4.0) if late else self.rng.uniform(0.05, 1.5)
        self.kill(name, detected_s, again_s=detected_s + self.rng.uniform(0.1, 1.0))

    def kill(self, name: str, detected_s: float, again_s: float) -> None:
        """The instance is gone at once; everyone hears of it later, and later yet it is back."""
        del self.nodes[name]
        self.met["deaths"] += 1
        self.after(detected_s, f"lost {name}", lambda: self._announce(name))
        self.after(again_s, f"boot {name}", lambda: self._boot(name))

    def _announce(self, name: str) -> None:
        """The roster reaches everyone for sure, though not at once."""
        data = wire.encode(Lost(name))
        for listener in [*self.gateways, *self.nodes]:
            deliver = partial(self._deliver, "controller", listener, data)
            self.after(self.rng.uniform(0.0, 0.05), f"lost {name}>{listener}", deliver)

    def _kill_gateway(self) -> None:
        if not self.gateways:
            return
        name = self.rng.choice(list(self.gateways))
        del self.gateways[name]
        self.after(self.rng.uniform(0.05, 1.5), f"lost {name}", lambda: self._announce(name))
        self.after(2.0, f"boot {name}", lambda: self._boot_gateway(name))

    def _migrate(self) -> None:
        name = self.rng.choice(list(self.nodes)) if self.nodes else None
        targets = [n for n in self.nodes if n != name]
        if name is None or not targets:
            return
        held = [running.request_id for running in self.nodes[name].instance.load().sequences]
        if held:
            message = Migrate(self.rng.choice(held), self.rng.choice(targets), "balance")
            self.send("controller", name, message)

    def _drain(self) -> None:
        if len(self.nodes) > 1:
            self.nodes[self.rng.choice(list(self.nodes))].instance.drain()

    def _switch_role(self) -> None:
        if self.nodes:
            self.nodes[self.rng.choice(list(self.nodes))].instance.set_role(
                self.rng.choice(list(Role))
            )

    # Gateways and their clients.

    def expected(self, request: Request) -> list[int]:
        """What the request must be answered with."""
        return expected_output(request)

    def choose_route(self, request: Request, ready: list[str]) -> Route:
        """Any instance may prefill, and any other decode, as routers do by policy."""
        first = self.rng.choice(ready)
        others = [name for name in ready if name != first]
        mixed = self.nodes[first].instance.role is Role.MIXED
        alone = mixed or not others or self.rng.random() < 0.1
        return Route(first) if alone else Route(first, self.rng.choice(others))

    def delivered(self, request_id: str, index: int) -> None:
        """A client has got its next token."""

    def _boot_gateway(self, name: str) -> None:
        self.gateways[name] = SimulatedGateway(name, self)

    def _submit_requests(self) -> None:
        bursts = [self.rng.uniform(0.0, FAULTS_END_S * 0.8) for _ in range(2)]
        prefixes = [self._tokens(self.rng.randint(1, 12)) for _ in range(3)]
        for number in range(self.rng.randint(4, 24)):
            at = self.rng.choice((self.rng.uniform(0.0, FAULTS_END_S * 0.8), *bursts))
            request = self._request(number, at, prefixes)
            self.after(at, f"request {number}", lambda r=request: self._submit(r))
            self._submit_siblings(request)
            for chance, bad in (
                (self.faults.poison, self._poison),
                (self.faults.lethal, self._lethal),
            ):
                if self.rng.random() < chance:
                    bad.add(request.id)
            if self.rng.random() < self.faults.cancel:
                leaves = at + self.rng.uniform(0.0, 2.0)
                self.after(leaves, f"cancel {number}", lambda r=request: self._cancel(r))

    def _submit_siblings(self, request: Request) -> None:
        """What a gateway makes of n > 1: more requests of the same prompt at the same moment."""
        for number in range(self.rng.choice((0, 0, 0, 0, 1, 3))):
            name = f"{request.id}#{number}"
            sampling = replace(request.sampling, seed=1000 + number)
            sibling = replace(request, id=name, sampling=sampling)
            self.after(request.arrival_s, f"request {name}", lambda r=sibling: self._submit(r))

    def _request(self, number: int, at: float, prefixes: list[tuple[int, ...]]) -> Request:
        shared = self.rng.choice(prefixes) if self.rng.random() < 0.5 else ()
        sampling = Sampling(
            max_tokens=self.rng.randint(1, self.rng.choice((2, 12, 50))),
            seed=self.rng.choice((0, number)),
            ignore_eos=self.rng.random() < 0.7,
            logprobs=self._drawn_logprobs(),
        )
        return Request(
            f"r{number}",
            shared + self._tokens(self.rng.randint(1, 14)),
            sampling,
            Slo(self.rng.choice((0.1, 2.0)), self.rng.choice((0.02, 0.2))),
            priority=self.rng.choice((0, 0, 0, 1)),
            arrival_s=at,
            tenant=self.rng.choice(("", "", "other")),
        )

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(1, 64) for _ in range(count))

    def _submit(self, request: Request) -> None:
        if self.gateways:
            self.gateways[self.rng.choice(list(self.gateways))].submit(request)

    def _cancel(self, request: Request) -> None:
        for gateway in self.gateways.values():
            gateway.cancel(request.id)
