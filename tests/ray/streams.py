"""Readers of many streams, and what is true of a cluster that has nothing left to do."""

from __future__ import annotations

import asyncio
import time

from cluster.rpc import tandem_pb2 as pb

TOKENS = 300
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
        self.tokens, self.longest_gap_s, self.finish = [], 0.0, ""
        self.migrations, self.begun = 0, asyncio.Event()
        self.task = asyncio.create_task(self._read(client.stream(request(number, tokens))))

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
            if len(self.tokens) >= 5:
                self.begun.set()


async def read_all(cluster, *, tokens=TOKENS, disturb=None):
    """Every prompt's tokens; `disturb` is called once all streams flow."""
    async with cluster.async_client() as client:
        readers = [Reader(client, number, tokens) for number in range(len(PROMPTS))]
        if disturb is not None:
            await asyncio.gather(*(reader.begun.wait() for reader in readers))
            await asyncio.to_thread(disturb)
        await asyncio.gather(*(reader.task for reader in readers))
    assert {reader.finish for reader in readers} == {"length"}
    print(f"longest stall {max(reader.longest_gap_s for reader in readers):.2f} s")
    return [reader.tokens for reader in readers]


async def until(condition, within_s=60.0):
    deadline = time.monotonic() + within_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.1)


def all_ready(cluster, count=3):
    def condition():
        with cluster.client() as client:
            return [i.state for i in client.status().instances] == ["ready"] * count

    return condition


def holds_nothing(cluster):
    def condition():
        with cluster.client() as client:
            status = client.status()
        free = all(i.free_blocks == i.total_blocks for i in status.instances)
        return free and not status.requests

    return condition
