"""Streams survive the death of any process but their gateway's, token for token."""

import asyncio
import os
import signal

import pytest

from tests.ray.streams import (
    PROMPTS,
    TOKENS,
    Reader,
    all_ready,
    holds_nothing,
    read_all,
    started_anew,
    until,
)


async def recovered(cluster, instance, former_pids):
    """The cluster has seen the death and mended it: no later test meets a dead instance."""
    await until(started_anew(cluster, instance, former_pids))
    await until(all_ready(cluster))
    await until(holds_nothing(cluster))


async def test_both_decode_instances_and_repeated_runs_agree(cluster, undisturbed):
    assert all(len(tokens) == TOKENS for tokens in undisturbed)
    assert await read_all(cluster) == undisturbed


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_streams_go_on_after_a_worker_is_killed(cluster, undisturbed, victim):
    pids = cluster.pids(victim)
    assert await read_all(cluster, disturb=lambda: cluster.kill_worker(victim)) == undisturbed
    await recovered(cluster, victim, pids)


async def test_streams_go_on_after_a_worker_hangs(cluster, undisturbed):
    hung = []

    def stop():
        with cluster.client() as client:
            busiest = max(client.status().instances, key=lambda one: one.running_sequences)
        hung.append(busiest)
        os.kill(busiest.workers[0].pid, signal.SIGSTOP)

    assert await read_all(cluster, disturb=stop) == undisturbed
    (instance,) = hung
    await recovered(cluster, instance.id, [worker.pid for worker in instance.workers])


async def test_prompts_that_wait_on_a_killed_prefill_worker_are_answered(cluster, undisturbed):
    pids = cluster.pids("prefill-0")
    async with cluster.async_client() as client:
        readers = [Reader(client, number, 20) for number in range(len(PROMPTS))]
        await asyncio.to_thread(os.kill, pids[0], signal.SIGKILL)
        await asyncio.gather(*(reader.task for reader in readers))
    assert [reader.tokens for reader in readers] == [tokens[:20] for tokens in undisturbed]
    await recovered(cluster, "prefill-0", pids)


async def test_streams_do_not_notice_the_controllers_death(cluster, undisturbed):
    def kill_controller():
        os.kill(cluster.controller_pid(), signal.SIGKILL)

    assert await read_all(cluster, disturb=kill_controller) == undisturbed
    await until(all_ready(cluster))
    pids = cluster.pids("decode-1")
    assert await read_all(cluster, disturb=lambda: cluster.kill_worker("decode-1")) == undisturbed
    await recovered(cluster, "decode-1", pids)


async def test_an_instance_is_started_anew_by_a_controller_whose_predecessor_died_at_it(
    cluster, undisturbed
):
    pids = cluster.pids("decode-0")

    def died():
        with cluster.client() as client:
            one = next(one for one in client.status().instances if one.id == "decode-0")
        return one.state != "ready" or started_anew(cluster, "decode-0", pids)()

    cluster.kill_worker("decode-0")
    await until(died)
    os.kill(cluster.controller_pid(), signal.SIGKILL)
    await recovered(cluster, "decode-0", pids)
    assert await read_all(cluster) == undisturbed
