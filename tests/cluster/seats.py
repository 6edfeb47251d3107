"""Gateways with what each of them shows of the whole cluster."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from cluster.gateway import peers
from cluster.watching.live import Live
from cluster.watching.observer import Observers
from cluster.watching.whole import WholeCluster
from tests.cluster.serving import FakeCluster, running, settle, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from cluster.gateway.gateway import Gateway

PREDICTED = {"ttft_s": {"p50": 0.2, "p90": 0.4, "p99": 0.6}, "attainment": 0.95}
ABOUT = {
    "model": "demo",
    "slo": {"ttft_s": 2.0, "tpot_s": 0.1, "attainment": 0.9},
    "predicted": PREDICTED,
}


@contextmanager
def patience(answer_s: float) -> Iterator[None]:
    """A machine that stands still for a second is no gateway that does not answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "ANSWER_S", answer_s)
        yield


@dataclass(frozen=True, slots=True)
class Seat:
    """A gateway and what it shows; `kept_s` is how long that is not made again."""

    cluster: FakeCluster
    gateway: Gateway
    whole: WholeCluster

    @staticmethod
    def at(cluster: FakeCluster, gateway: Gateway, kept_s: float) -> Seat:
        watched = Live()
        gateway.observers = Observers([watched])
        return Seat(cluster, gateway, WholeCluster(watched, gateway, ABOUT, kept_s))


@asynccontextmanager
async def watched_by_all(
    *names: str, gateways: int = 2, kept_s: float = 0.0
) -> AsyncIterator[list[Seat]]:
    with patience(60.0):
        async with running(*names, gateways=gateways) as cluster:
            seats = [Seat.at(cluster, gateway, kept_s) for gateway in cluster.gateways.values()]
            cluster.tell_loads()
            await settle()
            yield seats
            await settle()
            await until(lambda: not any(one.sequences for one in cluster.instances.values()))
            cluster.assert_empty()
