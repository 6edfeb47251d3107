"""Two Ray nodes in network namespaces, KV over TCP between them, and one of them is lost."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.serving import command_of, descendants, serve, until_gone
from tests.ray.streams import read_all, until

RAY = str(Path(sys.executable).with_name("ray"))
NODES = {"prefill": "10.213.7.1", "decode": "10.213.7.2"}
HERE, DOOR = "10.213.8.1", "10.213.8.2"
"""The test's end of its line to the first node, and the node's."""
PORT, WAIT_S = 6399, 60
CONFIG = """
model: demo
device: cpu
pools:
  prefill: {instances: 1, resources: {prefill_node: 0.1}}
  decode: {instances: 1, resources: {decode_node: 0.1}}
transfer: {transport: nixl}
"""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def space(role):
    return f"td-{os.getpid()}-{role}"


def inside(role):
    return ("ip", "netns", "exec", space(role))


def connect(ends):
    """A line between two namespaces, or the test's own where it is None."""
    names = [f"td{os.getpid()}{letter}{len(ends)}{place}" for place, letter in enumerate("ab")]
    names = [f"{name[-13:]}" for name in names]
    ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
    for name, (role, address) in zip(names, ends, strict=True):
        within = ()
        if role is not None:
            ip("link", "set", name, "netns", space(role))
            within = ("-n", space(role))
        ip(*within, "addr", "add", f"{address}/24", "dev", name)
        ip(*within, "link", "set", name, "up")


@pytest.fixture
def spaces():
    with contextlib.ExitStack() as undo:
        for role in NODES:
            try:
                ip("netns", "add", space(role))
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"network namespaces are not permitted here: {error}")
            undo.callback(ip, "netns", "del", space(role))
            ip("-n", space(role), "link", "set", "lo", "up")
        connect(list(NODES.items()))
        connect([(None, HERE), ("prefill", DOOR)])
        yield


@pytest.fixture
def nodes(spaces, tmp_path, monkeypatch):
    """Each role's raylet, with what its workers find on their node."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    session = f"/tmp/ray-{os.getpid()}"
    heads = {
        "prefill": ["--head", f"--port={PORT}", f"--temp-dir={session}"],
        "decode": [f"--address={NODES['prefill']}:{PORT}"],
    }
    started = {}
    for role, arguments in heads.items():
        started[role] = start(role, arguments, tmp_path / f"{role}.log")
    yield started
    processes = {pid for node in started.values() for pid in descendants(node.pid)}
    for node in started.values():
        node.send_signal(signal.SIGTERM)
        node.wait(WAIT_S)
    kill(until_gone(processes, 20.0))
    shutil.rmtree(session, ignore_errors=True)


def start(role, arguments, log):
    command = [*inside(role), RAY, "start", "--block", *arguments, "--num-cpus=2"]
    command += [f"--node-ip-address={NODES[role]}", "--object-store-memory=80000000"]
    command += ["--disable-usage-stats", "--include-dashboard=false"][
        : 2 if role == "prefill" else 1
    ]
    command += [f'--resources={{"{role}_node": 1}}']
    with log.open("w") as out:
        node = subprocess.Popen(command, stdout=out, stderr=out)
    wait_for_line(log, node, "Ray runtime started")
    return node


def wait_for_line(log, process, wanted):
    follow = ["timeout", str(WAIT_S), "tail", "-n+1", "-f", str(log)]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as tail:
        assert any(wanted in line for line in tail.stdout), log.read_text()
        tail.kill()
    assert process.poll() is None, log.read_text()


def kill(processes):
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def lose(node):
    """Everything on it dies at once."""
    kill({node.pid, *descendants(node.pid)})


@pytest.fixture
def cluster(nodes, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    address = f"{NODES['prefill']}:{PORT}"
    serving = serve(
        tmp_path / "serve.log",
        str(config),
        *("--address", address, "--host", DOOR, "--insecure"),
        inside=inside("prefill"),
    )
    yield serving
    assert serving.end() == 0, serving.log.read_text()[-4000:]


async def test_kv_crosses_nodes_over_tcp_and_a_lost_node_costs_a_pause(cluster, nodes):
    with cluster.client() as client:
        seats = {one.role: one for one in client.status().instances}
        assert seats["prefill"].node != seats["decode"].node
        route = client.generate("Once upon a time", max_tokens=4).summary.route
        assert (route.prefill, route.decode) == ("prefill-0", "decode-0")
    undisturbed = await read_all(cluster, tokens=100)
    assert await read_all(cluster, tokens=100, disturb=lambda: lose(nodes["decode"])) == undisturbed
    assert not command_of(nodes["decode"].pid)
    await until(lambda: holds_nothing(cluster))


def holds_nothing(cluster):
    with cluster.client() as client:
        status = client.status()
    ready = [one for one in status.instances if one.state == "ready"]
    free = all(one.free_blocks == one.total_blocks for one in ready)
    return [one.id for one in ready] == ["prefill-0"] and free and not status.requests
