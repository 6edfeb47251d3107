"""Readers of many streams, and what is true of a cluster that has nothing left to do."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from cluster.rpc import tandem_pb2 as pb
from engine.errors import BadInput, DeadlineExceeded, InstanceLost, NotFound
from tests.ray.serving import LOOK_S, PATIENCE_S

TOKENS = 300
ENDLESS = 4000
"""As many as the model's context leaves: a stream that is not over by the time it is disturbed."""
ASK_S = 0.1
"""Between two questions to a cluster, whose processors have other things to do."""
BEGUN = 5
PROMPTS = [f"Once upon a time there was a {animal}" for animal in (
    "fox", "hen", "cat", "dog", "pig", "cow", "owl", "bee",
    "goat", "duck", "frog", "bear", "wolf", "lamb", "crow", "deer",
)]  # fmt: skip


def request(number, tokens):
    sampling = pb.Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return pb.GenerateRequest(text=PROMPTS[number], sampling=sampling)


class Reader:
    """Reads one stream and knows how far it is and how long it stalled."""

    def __init__(self, client, number, tokens):
        self.tokens, self.longest_gap_s, self.finish, self.migrations = [], 0.0, "", 0
        self.task = asyncio.create_task(self._read(client.stream(request(number, tokens))))

    async def has(self, tokens=BEGUN):
        """Returns once so many have come; if the stream breaks before, raises what broke it."""
        while len(self.tokens) < tokens and not self.task.done():
            await asyncio.wait({self.task}, timeout=LOOK_S)
        if len(self.tokens) < tokens:
            await self.task
            raise AssertionError(f"ended after {len(self.tokens)} tokens: {self.finish}")

    async def leave(self):
        """As a client that hangs up."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _read(self, stream):
        last_s = None
        async for chunk in stream:
            now_s = time.monotonic()
            if last_s is not None:
                self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
            last_s = now_s
            self.tokens += chunk.token_ids
            self.finish = chunk.finish_reason or self.finish
            self.migrations = chunk.summary.migrations


async def read_all(cluster, *, tokens=TOKENS, disturb=None):
    """Every prompt's tokens; `disturb` is called once all streams flow."""
    async with cluster.async_client() as client:
        readers = [Reader(client, number, tokens) for number in range(len(PROMPTS))]
        if disturb is not None:
            await asyncio.gather(*(reader.has() for reader in readers))
            await asyncio.to_thread(disturb)
        await asyncio.gather(*(reader.task for reader in readers))
    assert {reader.finish for reader in readers} == {"length"}
    print(f"longest stall {max(reader.longest_gap_s for reader in readers):.2f} s")
    return [reader.tokens for reader in readers]


async def until(condition):
    """While a controller's successor starts the cluster does not answer: it is asked again."""
    deadline = time.monotonic() + PATIENCE_S
    while not await asyncio.to_thread(_holds, condition):
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(ASK_S)


def _holds(condition):
    try:
        return condition()
    except (InstanceLost, DeadlineExceeded):
        return False


def all_ready(cluster, count=3):
    def condition():
        with cluster.client() as client:
            return [i.state for i in client.status().instances] == ["ready"] * count

    return condition


def started_anew(cluster, instance, former_pids):
    """Whether it is up and none of its processes is one of those."""

    def condition():
        with cluster.client() as client:
            one = next(one for one in client.status().instances if one.id == instance)
        pids = {worker.pid for worker in one.workers}
        return one.state == "ready" and bool(pids) and pids.isdisjoint(former_pids)

    return condition


def moved(cluster, request_id, between):
    """Whether the request has migrated, to or from one of two instances. As long as it has not,
    it is asked for: the controller may not know yet where a request runs that has just begun."""

    def condition():
        with cluster.client() as client:
            one = next((one for one in client.status().requests if one.id == request_id), None)
            if one is not None and not one.migrations:
                target = between[one.decode == between[0]]
                with suppress(NotFound, BadInput):  # It may have just moved there by itself.
                    client.migrate(request_id, target)
        return one is not None and one.migrations > 0

    return condition


def holds_nothing(cluster):
    def condition():
        with cluster.client() as client:
            status = client.status()
        free = all(i.free_blocks == i.total_blocks for i in status.instances)
        return free and not status.requests

    return condition
