"""Streams survive the death of any process but their gateway's, token for token."""

import asyncio
import os
import signal

import pytest

from tests.ray.streams import PROMPTS, TOKENS, Reader, all_ready, holds_nothing, read_all, until


async def test_both_decode_instances_and_repeated_runs_agree(cluster, undisturbed):
    assert all(len(tokens) == TOKENS for tokens in undisturbed)
    assert await read_all(cluster) == undisturbed


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_streams_go_on_after_a_worker_is_killed(cluster, undisturbed, victim):
    assert await read_all(cluster, disturb=lambda: cluster.kill_worker(victim)) == undisturbed
    await until(all_ready(cluster))
    await until(holds_nothing(cluster))


async def test_streams_go_on_after_a_worker_hangs(cluster, undisturbed):
    def stop():
        with cluster.client() as client:
            busiest = max(client.status().instances, key=lambda one: one.running_sequences)
        os.kill(busiest.workers[0].pid, signal.SIGSTOP)

    assert await read_all(cluster, disturb=stop) == undisturbed
    await until(all_ready(cluster))
    await until(holds_nothing(cluster))


async def test_prompts_that_wait_on_a_killed_prefill_worker_are_answered(cluster, undisturbed):
    async with cluster.async_client() as client:
        readers = [Reader(client, number, 20) for number in range(len(PROMPTS))]
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


async def test_an_instance_is_started_anew_by_a_controller_whose_predecessor_died_at_it(
    cluster, undisturbed
):
    def lost():
        with cluster.client() as client:
            return [one.state for one in client.status().instances].count("ready") < 3

    cluster.kill_worker("decode-0")
    await until(lost)
    os.kill(cluster.controller_pid(), signal.SIGKILL)
    await until(all_ready(cluster))
    assert await read_all(cluster) == undisturbed
