"""Streams survive the death of any process but their gateway's, token for token."""

import asyncio
import os
import signal
import time

import pytest

from cluster.rpc import tandem_pb2 as pb

STREAMS = 16
TOKENS = 300
PROMPTS = [f"Once upon a time there was a {animal}" for animal in (
    "fox", "hen", "cat", "dog", "pig", "cow", "owl", "bee",
    "goat", "duck", "frog", "bear", "wolf", "lamb", "crow", "deer",
)]  # fmt: skip


def request(prompt, tokens=TOKENS):
    sampling = pb.Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return pb.GenerateRequest(text=prompt, sampling=sampling)


class Reader:
    """Reads one stream and knows how far it is and how long it stalled."""

    def __init__(self, client, prompt, tokens):
        self.tokens, self.longest_gap_s, self.finish = [], 0.0, ""
        self.migrations, self.begun = 0, asyncio.Event()
        self.task = asyncio.create_task(self._read(client.stream(request(prompt, tokens))))

    async def _read(self, stream):
        last_s = None
        async for chunk in stream:
            now_s = time.monotonic()
            if last_s is not None:
                self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
            last_s = now_s
            self.tokens += chunk.token_ids
            self.finish = chunk.finish_reason or self.finish
            if len(self.tokens) >= 5:
                self.begun.set()


async def read_all(cluster, *, tokens=TOKENS, disturb=None):
    """Every prompt's tokens; `disturb` is called once all streams flow."""
    async with cluster.async_client() as client:
        readers = [Reader(client, prompt, tokens) for prompt in PROMPTS]
        if disturb is not None:
            await asyncio.gather(*(reader.begun.wait() for reader in readers))
            await asyncio.to_thread(disturb)
        await asyncio.gather(*(reader.task for reader in readers))
    assert {reader.finish for reader in readers} == {"length"}
    print(f"longest stall {max(reader.longest_gap_s for reader in readers):.2f} s")
    return [reader.tokens for reader in readers]


@pytest.fixture(scope="session")
def undisturbed(cluster):
    return asyncio.run(read_all(cluster))


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


async def test_both_decode_instances_and_repeated_runs_agree(cluster, undisturbed):
    assert all(len(tokens) == TOKENS for tokens in undisturbed)
    assert await read_all(cluster) == undisturbed


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_streams_go_on_after_a_worker_is_killed(cluster, undisturbed, victim):
    assert await read_all(cluster, disturb=lambda: cluster.kill_worker(victim)) == undisturbed
    await until(all_ready(cluster))
    await until(holds_nothing(cluster))


async def test_prompts_that_wait_on_a_killed_prefill_worker_are_answered(cluster, undisturbed):
    async with cluster.async_client() as client:
        readers = [Reader(client, prompt, 20) for prompt in PROMPTS]
        await asyncio.to_thread(cluster.kill_worker, "prefill-0")
        await asyncio.gather(*(reader.task for reader in readers))
    assert [reader.tokens for reader in readers] == [tokens[:20] for tokens in undisturbed]
    await until(all_ready(cluster))


async def test_streams_do_not_notice_the_controllers_death(cluster, undisturbed):
    def kill_controller():
        os.kill(cluster.controller_pid(), signal.SIGKILL)

    assert await read_all(cluster, disturb=kill_controller) == undisturbed
    await until(all_ready(cluster))
    assert await read_all(cluster, disturb=lambda: cluster.kill_worker("decode-1")) == undisturbed
    await until(all_ready(cluster))
