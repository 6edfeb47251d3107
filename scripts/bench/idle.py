"""What an idle instance takes of a core, with every transport open and its gateway listening.

    python scripts/bench/idle.py [--seconds 10] [--shape 120m] [--transports auto] [--json]

Two real hosts know each other and a gateway, and nobody asks for anything: what they burn is
their heartbeats, the ticks of their leases, and whatever their transports do in the background.
`auto` opens all transports of this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.messages import Role
from engine.request import Request, Sampling
from engine.slo import Slo
from placement.routing.router import Route
from scripts.bench.two_hosts import Gateway, HostPlan, start, stop, write_model

GOAL, BLOCKS = 0.02, 256
NAMES = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as directory:
        shares = asyncio.run(measure(options, Path(directory)))
    if options.json:
        print(json.dumps({"idle_core_share": shares}, indent=2))
        return
    for name, share in shares.items():
        print(f"{name}: {share:.2%} of a core (goal {GOAL:.0%})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="120m")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--transports", default="auto")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


async def measure(options: argparse.Namespace, directory: Path) -> dict[str, float]:
    write_model(options.shape, directory / "model")
    plans = [
        HostPlan(
            name,
            role,
            str(directory / "model"),
            str(directory),
            BLOCKS,
            transport=options.transports,
            core=core,
        )
        for core, (name, role) in enumerate(NAMES.items())
    ]
    gateway = Gateway(directory)
    hosts = start(plans, gateway.link.address)
    gateway.meet(hosts)
    await hand_one_off(gateway)
    before = {host.plan.name: host.cpu_s() for host in hosts}
    await gateway.listen(options.seconds)
    shares: dict[str, Any] = {
        host.plan.name: (host.cpu_s() - before[host.plan.name]) / options.seconds for host in hosts
    }
    stop(hosts)
    gateway.link.close()
    return shares


async def hand_one_off(gateway: Gateway) -> None:
    """So that every thread and connection that use brings about is there."""
    request = Request("warm", tuple(range(3, 200)), Sampling(max_tokens=4), Slo(60, 10))
    await gateway.tokens(gateway.open(request, Route("prefill-0", "decode-0")), 4)


if __name__ == "__main__":
    main()
