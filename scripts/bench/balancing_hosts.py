"""A skewed load on two or three real hosts with small KV pools, with balancing off and on.

    python scripts/bench/balancing_hosts.py [--instances 2] [--blocks 96] [--rate 2.8]
        [--seconds 60] [--routers default] [--seeds 0] [--json]

The hosts, the engine, the journal, the router and the balancer are those of the cluster; the same
requests come at the same moments with balancing off and on. A few of them draw hundreds of tokens,
which nobody knows beforehand. The requests of all seeds are judged together; each seed runs off and
on in turns, the next one the other way round, for the machine's speed may drift.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster.gateway.entry import Deliver, Reroute
from engine.clock import SystemClock
from engine.messages import Load, Migrate, Migrated, Role
from engine.request import Request, Sampling
from engine.slo import Slo
from placement.balancing.balancer import Balancer
from placement.balancing.settings import BalancerSettings
from placement.routing.router import Policy, Router, RouterSettings
from placement.view import InstanceView, View
from scripts.bench.two_hosts import Gateway, HostPlan, start, stop, write_model

if TYPE_CHECKING:
    from placement.routing.router import Route

LONG_SHARE, LONG_TOKENS, SHORT_TOKENS, PROMPT_TOKENS = 0.12, (400, 900), (8, 64), (32, 160)
LOOK_S = 0.5
"""Between two looks of the balancer."""
SLO = Slo(1.0, 0.1)
HEADER = (
    "router       balancing  ttft p50   ttft p99  tpot p50  tpot p99  queue mean  "
    "queue p99    gap p99  preempted  moved (failed)"
)


@dataclass(frozen=True)
class Coming:
    at_s: float
    request: Request


def main() -> None:
    options = parse()
    rows = []
    if not options.json:
        print(HEADER)
    with tempfile.TemporaryDirectory() as directory:
        write_model(options.shape, Path(directory) / "model")
        for router in options.routers:
            seen: dict[bool, list[Seen]] = {False: [], True: []}
            for number, seed in enumerate(options.seeds):
                for balance in (False, True) if number % 2 == 0 else (True, False):
                    one = asyncio.run(run(options, Path(directory), router, seed, balance=balance))
                    seen[balance].append(one)
                    if not options.json and len(options.seeds) > 1:
                        show(f"seed {seed}", {"balancing": balance, **figures_of([one])})
            for balance, runs in seen.items():
                rows.append({"router": router, "balancing": balance, **figures_of(runs)})
                if not options.json:
                    show(router, rows[-1])
    if options.json:
        print(json.dumps(rows, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="120m")
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=96, help="of each instance's KV pool")
    parser.add_argument("--rate", type=float, default=2.8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--routers", nargs="+", default=["default"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def skewed(options: argparse.Namespace, seed: int) -> list[Coming]:
    generator = np.random.default_rng(seed)
    count = int(options.rate * options.seconds)
    moments = np.cumsum(generator.exponential(1.0 / options.rate, count))
    found = []
    for number, at_s in enumerate(moments.tolist()):
        lengths = LONG_TOKENS if generator.random() < LONG_SHARE else SHORT_TOKENS
        prompt = generator.integers(3, 30_000, generator.integers(*PROMPT_TOKENS))
        sampling = Sampling(
            max_tokens=int(generator.integers(*lengths)), temperature=0.0, ignore_eos=True
        )
        found.append(Coming(at_s, Request(f"r{number}", tuple(prompt.tolist()), sampling, SLO)))
    return found


@dataclass(frozen=True)
class Seen:
    """Of each request of one run; the longest gap is that between two of its tokens."""

    ttft_s: list[float]
    queue_s: list[float]
    tpot_s: list[float]
    gap_s: list[float]
    outcomes: list[str]
    preemptions: int


class BalancedGateway(Gateway):
    """Routes each request by what the hosts tell of their load, and may move it later."""

    def __init__(self, sockets: Path, policy: Policy, *, balance: bool) -> None:
        super().__init__(sockets)
        self.sent_s: dict[str, float] = {}
        self.sent_at_s: dict[str, float] = {}
        """By the clock of all hosts."""
        self._clock = SystemClock()
        self.outcomes: list[str] = []
        self._router = Router(RouterSettings(policy=policy))
        self._balancer = Balancer(BalancerSettings()) if balance else None
        self._loads: dict[str, Load] = {}
        self._waiting: dict[str, Request] = {}
        """Without a route so far."""
        self._unsent: dict[str, None] = {}
        """Of those, the ones that the journal has not seen."""
        self._asked: dict[str, Request] = {}

    def knows(self, hosts: int) -> bool:
        return len(self._loads) == hosts

    def ask(self, request: Request) -> None:
        self._asked[request.id] = request
        self.sent_s[request.id] = time.monotonic()
        self.sent_at_s[request.id] = self._clock.now()
        self._waiting[request.id] = request
        self._unsent[request.id] = None
        self._send_waiting()

    def look(self) -> None:
        if self._balancer is None:
            return
        for move in self._balancer.decide(self._view()):
            self.link.send(move.source, Migrate(move.request_id, move.target, move.reason))

    def heard(self, message: object) -> None:
        if isinstance(message, Load):
            self._loads[message.instance] = message
            self._send_waiting()
        elif isinstance(message, Migrated):
            self.outcomes.append(message.outcome)
            if message.outcome != "committed" and self._balancer is not None:
                self._balancer.failed(message.request_id)

    def _view(self) -> View:
        loads = sorted(self._loads.items())
        return View(time.monotonic(), tuple(InstanceView(load) for _, load in loads))

    def _send_waiting(self) -> None:
        for request in list(self._waiting.values()):
            route = self._router.choose(request, self._view())
            if route is None:
                return
            del self._waiting[request.id]
            self._router.dispatched(request, route, time.monotonic())
            self._go(request, route)

    def _go(self, request: Request, route: Route) -> None:
        if request.id in self._unsent:
            del self._unsent[request.id]
            self.open(request, route)
        else:
            self._carry_out(self._journal.restart(request.id, route, time.monotonic()))

    def _carry_out(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Reroute(request_id):
                    self._waiting[request_id] = self._asked[request_id]
                    self._send_waiting()
                case Deliver(token):
                    if token.index == 0:
                        self._router.prefilled(token.request_id, time.monotonic())
                    if token.finish is not None:
                        self._router.ended(token.request_id)
                case _:
                    super()._carry_out([action])


async def run(
    options: argparse.Namespace, directory: Path, router: str, seed: int, *, balance: bool
) -> Seen:
    sockets = directory / f"{router}-{seed}-{balance}"
    sockets.mkdir()
    plans = [
        HostPlan(
            f"decode-{core}",
            Role.MIXED,
            str(directory / "model"),
            str(sockets),
            options.blocks,
            core=core,
        )
        for core in range(options.instances)
    ]
    gateway = BalancedGateway(sockets, Policy(router), balance=balance)
    hosts = start(plans, gateway.link.address)
    gateway.meet(hosts)
    await gateway.until(lambda: gateway.knows(len(hosts)))
    coming = skewed(options, seed)
    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(look(gateway))
        asking = tasks.create_task(ask_all(gateway, coming))
        await gateway.until(lambda: asking.done() and all_ended(gateway, coming))
        looking.cancel()
    preemptions = sum(host.preemptions() for host in hosts)
    stop(hosts)
    gateway.link.close()
    return seen_of(gateway, coming, preemptions)


async def look(gateway: BalancedGateway) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        gateway.look()


async def ask_all(gateway: BalancedGateway, coming: list[Coming]) -> None:
    began_s = time.monotonic()
    for one in coming:
        await asyncio.sleep(began_s + one.at_s - time.monotonic())
        gateway.ask(one.request)


def all_ended(gateway: BalancedGateway, coming: list[Coming]) -> bool:
    return all(
        one.request.id in gateway.streams
        and len(gateway.streams[one.request.id].arrived_s) >= one.request.sampling.max_tokens
        for one in coming
    )


def seen_of(gateway: BalancedGateway, coming: list[Coming], preemptions: int) -> Seen:
    names = [one.request.id for one in coming]
    arrived = {name: gateway.streams[name].arrived_s for name in names}
    began_s = {name: gateway.streams[name].stamps["prefill_started_s"] for name in names}
    return Seen(
        ttft_s=[arrived[name][0] - gateway.sent_s[name] for name in names],
        queue_s=[began_s[name] - gateway.sent_at_s[name] for name in names],
        tpot_s=[(at[-1] - at[0]) / (len(at) - 1) for at in arrived.values() if len(at) > 1],
        gap_s=[max(b - a for a, b in pairwise(at)) for at in arrived.values() if len(at) > 1],
        outcomes=gateway.outcomes,
        preemptions=preemptions,
    )


def figures_of(runs: list[Seen]) -> dict[str, Any]:
    def all_of(name: str) -> list[float]:
        return [value for one in runs for value in getattr(one, name)]

    quantiles = {
        f"{name}_p{share}_s": float(np.quantile(all_of(f"{name}_s"), share / 100))
        for name in ("ttft", "tpot", "queue", "gap")
        for share in (50, 99)
    }
    outcomes = [outcome for one in runs for outcome in one.outcomes]
    return {
        "requests": len(all_of("ttft_s")),
        **quantiles,
        "queue_mean_s": float(np.mean(all_of("queue_s"))),
        "preemptions": sum(one.preemptions for one in runs),
        "migrations": outcomes.count("committed"),
        "failed_migrations": len(outcomes) - outcomes.count("committed"),
    }


def show(what: str, row: dict[str, Any]) -> None:
    print(
        f"{what:12} {'on' if row['balancing'] else 'off':9} {row['ttft_p50_s']:9.3f}s "
        f"{row['ttft_p99_s']:9.3f}s {row['tpot_p50_s']:8.4f}s {row['tpot_p99_s']:8.4f}s "
        f"{row['queue_mean_s']:10.3f}s {row['queue_p99_s']:9.3f}s {row['gap_p99_s']:9.3f}s "
        f"{row['preemptions']:10} {row['migrations']:6} ({row['failed_migrations']})",
        flush=True,
    )


if __name__ == "__main__":
    main()
