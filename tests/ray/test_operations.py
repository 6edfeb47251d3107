"""What an operator does to a running cluster, while somebody reads."""

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from contextlib import aclosing

import pytest

from cluster.cli.app import run
from engine.errors import NotFound
from tests.ray.serving import PATIENCE_S, metric
from tests.ray.streams import ENDLESS, Reader, all_ready, holds_nothing, moved, read_all, until

INSTANCES = ["decode-0", "decode-1", "prefill-0"]


def tandem(cluster, *arguments):
    """Runs a command against the cluster; its exit status and its JSON document."""
    command = [sys.executable, "-m", "cluster", *arguments, "--server", cluster.grpc, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


@pytest.fixture
def refused(cluster, capsys):
    """Asks the cluster for something within this process; the exit status and what is said."""

    def command(*arguments):
        status = run([*arguments, "--server", cluster.grpc, "--json"])
        out, err = capsys.readouterr()
        assert out == ""
        return status, err

    return command


def test_http_and_grpc_give_the_same_answer(cluster):
    prompt = "Once upon a time"
    body = {"model": "demo", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    call = urllib.request.Request(
        f"{cluster.http}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(call, timeout=PATIENCE_S) as reply:
        over_http = json.load(reply)["choices"][0]["text"]
    status, document = tandem(
        cluster, "generate", prompt, "--max-tokens", "24", "--temperature", "0"
    )
    assert status == 0
    assert document["text"] == over_http
    assert document["usage"]["completion_tokens"] == 24
    # A prefill instance that seems slow is passed over: a decode instance may do both.
    assert document["route"]["prefill"] in INSTANCES
    assert document["route"]["decode"] in INSTANCES


def test_status_tells_where_everything_is(cluster):
    status, document = tandem(cluster, "status")
    assert status == 0
    assert document["endpoints"] == {"http": cluster.http, "grpc": cluster.grpc}
    assert [i["id"] for i in document["instances"]] == INSTANCES
    for instance in document["instances"]:
        (worker,) = instance["workers"]
        os.kill(worker["pid"], 0)


def test_workers_give_way_to_nobody(cluster):
    ours = os.getpriority(os.PRIO_PROCESS, cluster.process.pid)
    for instance in INSTANCES:
        (worker,) = cluster.pids(instance)
        assert os.getpriority(os.PRIO_PROCESS, worker) == ours


def test_bad_input_is_one_line_and_status_2(refused):
    for arguments in (["scale", "both=2"], ["scale", "decode=x"], ["role", "decode-0", "cook"]):
        status, line = refused(*arguments)
        assert status == 2
        assert line.count("\n") == 1


def test_what_does_not_exist_is_status_1(refused):
    for arguments in (["migrate", "nothing", "decode-0"], ["drain", "decode-9"]):
        status, line = refused(*arguments)
        assert (status, "NotFound" in line) == (1, True)


async def test_a_running_request_migrates_without_a_change_in_its_tokens(cluster):
    async with cluster.async_client() as client:
        reader = Reader(client, 0, ENDLESS)
        await reader.has()
        (running,) = (await client.status()).requests
        await until(moved(cluster, running.id, ("decode-0", "decode-1")))
        await reader.has(len(reader.tokens) + 20)
        await reader.leave()
        again = Reader(client, 0, len(reader.tokens))
        await again.task
    assert reader.tokens == again.tokens
    await until(holds_nothing(cluster))


async def test_a_move_is_over_when_it_is_said_to_be_and_an_ended_request_is_not_found(cluster):
    pair = ("decode-0", "decode-1")
    async with cluster.async_client() as client:
        reader = Reader(client, 0, ENDLESS)
        await reader.has()
        await until(moved(cluster, (await client.status()).requests[0].id, pair))
        (running,) = (await client.status()).requests
        target = pair[running.decode == pair[0]]
        reply = await client.migrate(running.id, target, wait=True)
        assert (reply.source, reply.target) == (running.decode, target)
        assert (await client.status()).requests[0].decode == target
        await reader.leave()
        with pytest.raises(NotFound):
            await client.migrate(running.id, running.decode, wait=True)
    await until(holds_nothing(cluster))


async def test_a_drained_instance_leaves_no_reader_behind(cluster, undisturbed):
    def grow_and_drain():
        with cluster.client() as client:
            assert list(client.scale("decode", 3).started) == ["decode-2"]
            client.drain("decode-0")

    assert await read_all(cluster, disturb=grow_and_drain) == undisturbed
    with cluster.client() as client:
        assert list(client.scale("decode", 2).started) == []
    await until(all_ready(cluster))
    names = {"decode-1", "decode-2", "prefill-0"}
    with cluster.client() as client:
        assert {i.id for i in client.status().instances} == names
        assert list(client.scale("decode", 3).started) == ["decode-0"]
        # Not the last by name: one that is not up yet has nothing to move away.
        assert list(client.scale("decode", 2).draining) == ["decode-0"]
    await until(all_ready(cluster))
    with cluster.client() as client:
        assert list(client.scale("decode", 3).started) == ["decode-0"]
        client.drain("decode-2")
    await until(all_ready(cluster))


async def test_an_instance_that_is_not_wanted_before_it_is_up_is_given_up(cluster):
    controller = cluster.controller_pid()
    with cluster.client() as client:
        started = list(client.scale("decode", 3).started)
        assert list(client.scale("decode", 2).draining) == started == ["decode-2"]
    await until(all_ready(cluster))
    assert cluster.controller_pid() == controller


async def test_a_role_can_be_switched_and_switched_back(cluster, undisturbed):
    def roles():
        with cluster.client() as client:
            return {i.id: i.role for i in client.status().instances}

    with cluster.client() as client:
        client.set_role("decode-0", "mixed")
    await until(lambda: roles()["decode-0"] == "mixed")
    assert await read_all(cluster) == undisturbed
    with cluster.client() as client:
        client.set_role("decode-0", "decode")
    await until(lambda: roles()["decode-0"] == "decode")


async def test_a_reader_that_leaves_frees_every_block_at_once(cluster):
    aborted = 'tandem_requests_total{outcome="abort"}'
    before = metric(cluster, aborted)
    async with cluster.async_client() as client:
        readers = [Reader(client, number, ENDLESS) for number in range(8)]
        await asyncio.gather(*(reader.has() for reader in readers))
        await asyncio.gather(*(reader.leave() for reader in readers))
        # None of them has ended by itself, which would free blocks as well.
        await until(lambda: metric(cluster, aborted) == before + len(readers))
    await until(holds_nothing(cluster))


async def test_watchers_hear_what_happens(cluster):
    heard = asyncio.Event()

    async def toggle():
        while not heard.is_set():
            for role in ("mixed", "decode"):
                await client.set_role("decode-1", role)

    async with cluster.async_client() as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(toggle())
        async with aclosing(client.watch("instance")) as events:
            async for event in events:
                assert event.kind == "instance"
                if (event.subject, event.text) == ("decode-1", "role changed"):
                    break
        heard.set()
