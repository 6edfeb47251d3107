"""What an operator does to a running cluster, while somebody reads."""

import asyncio
import json
import os
import subprocess
import sys
import urllib.request

from tests.ray.streams import TOKENS, Reader, all_ready, holds_nothing, read_all, until


def tandem(cluster, *arguments):
    """Runs a command against the cluster; its exit status and its JSON document."""
    command = [sys.executable, "-m", "cluster", *arguments, "--server", cluster.grpc, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


def test_http_and_grpc_give_the_same_answer(cluster):
    prompt = "Once upon a time"
    body = {"model": "demo", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    call = urllib.request.Request(
        f"{cluster.http}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(call, timeout=30) as reply:
        over_http = json.load(reply)["choices"][0]["text"]
    status, document = tandem(
        cluster, "generate", prompt, "--max-tokens", "24", "--temperature", "0"
    )
    assert status == 0
    assert document["text"] == over_http
    assert document["usage"]["completion_tokens"] == 24
    assert document["route"]["prefill"] == "prefill-0"
    assert document["route"]["decode"].startswith("decode-")


def test_status_tells_where_everything_is(cluster):
    status, document = tandem(cluster, "status")
    assert status == 0
    assert document["endpoints"] == {"http": cluster.http, "grpc": cluster.grpc}
    assert [i["id"] for i in document["instances"]] == ["decode-0", "decode-1", "prefill-0"]
    for instance in document["instances"]:
        (worker,) = instance["workers"]
        os.kill(worker["pid"], 0)


def test_bad_input_is_one_line_and_status_2(cluster):
    for arguments in (["scale", "both=2"], ["scale", "decode=x"], ["role", "decode-0", "cook"]):
        status, line = tandem(cluster, *arguments)
        assert status == 2
        assert line.count("\n") == 1


def test_what_does_not_exist_is_status_1(cluster):
    for arguments in (["migrate", "nothing", "decode-0"], ["drain", "decode-9"]):
        status, line = tandem(cluster, *arguments)
        assert (status, "NotFound" in line) == (1, True)


async def test_a_running_request_migrates_without_a_change_in_its_tokens(cluster, undisturbed):
    async with cluster.async_client() as client:
        reader = Reader(client, 0, TOKENS)
        await reader.begun.wait()
        status = await client.status()
        (running,) = status.requests
        target = "decode-1" if running.decode == "decode-0" else "decode-0"
        await client.migrate(running.id, target)
        await reader.task
    assert reader.tokens == undisturbed[0]
    assert reader.migrations == 1
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
        client.drain("decode-2")
    await until(all_ready(cluster))


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
    async with cluster.async_client() as client:
        readers = [Reader(client, number, TOKENS) for number in range(8)]
        await asyncio.gather(*(reader.begun.wait() for reader in readers))
        for reader in readers:
            reader.task.cancel()
        await asyncio.gather(*(reader.task for reader in readers), return_exceptions=True)
    await until(holds_nothing(cluster), within_s=5.0)


async def test_watchers_hear_what_happens(cluster):
    async def toggle():
        async with cluster.async_client() as client:
            while True:
                for role in ("mixed", "decode"):
                    await client.set_role("decode-1", role)
                    await asyncio.sleep(0.1)

    async with cluster.async_client() as client, asyncio.timeout(30):
        toggling = asyncio.create_task(toggle())
        async for event in client.watch("instance"):
            assert (event.kind, event.subject) == ("instance", "decode-1")
            break
        toggling.cancel()
        await client.set_role("decode-1", "decode")
