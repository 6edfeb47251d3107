#!/usr/bin/env python3
"""What one gateway process can stream, with an instance that costs nothing.

The gateway runs alone on one core; this process is the instance (over the cluster's own ZMQ link)
and the client on another. Tokens are offered at steady rates, a step of one token per stream at a
time. Printed: tokens delivered a second at the highest rate that was kept up with, and what the
gateway adds to a token's way at half that rate, from the instance's send to the client's read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cluster.rpc import tandem_pb2 as pb
from cluster.zmq_link import ZmqLink
from engine.messages import Abort, InstanceState, Load, Role, Start, Token, Tokens
from engine.request import FinishReason

INSTANCE, GATEWAY = "mixed-0", "gateway-0"
STEP_TOKENS = 16


async def run_gateway(folder: Path) -> None:
    """The process under test."""
    import uvicorn

    import engine
    from cluster.collector import spare_what_is_loaded
    from cluster.doors.both import listen
    from cluster.doors.grpc_door import GrpcDoor
    from cluster.doors.http import HttpDoor
    from cluster.gateway.gateway import Gateway
    from cluster.gateway.settings import GatewaySettings
    from engine.clock import SystemClock
    from engine.tokenizer import Tokenizer
    from placement.routing.admission import AdmissionSettings

    link = ZmqLink(GATEWAY, f"ipc://{folder}/gateway", None)
    link.connect(INSTANCE, f"ipc://{folder}/instance")
    tokenizer = Tokenizer.open(Path(engine.__file__).parent / "demo")
    settings = GatewaySettings(admission=AdmissionSettings(ahead_requests=4096))
    gateway = Gateway(
        link, tokenizer, SystemClock(), model="bench", context_tokens=1 << 20, settings=settings
    )
    config = uvicorn.Config(
        HttpDoor(gateway).app, port=0, http="httptools", lifespan="off", log_level="warning",
        access_log=False,
    )  # fmt: skip
    server = uvicorn.Server(config)
    listener = listen("127.0.0.1", 0, "port")
    door = GrpcDoor(gateway, object(), port=0)
    await door.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(gateway.run())
        tasks.create_task(server.serve([listener]))
        spare_what_is_loaded()
        print(json.dumps({"http": listener.getsockname()[1], "grpc": door.port}), flush=True)


@dataclass
class Run:
    """One offered rate: what was sent when, and what arrived how late."""

    sent_s: dict[str, list[float]] = field(default_factory=dict)
    late_s: list[float] = field(default_factory=list)
    delivered: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    def arrived(self, request_id: str, first_index: int, count: int) -> None:
        now = time.perf_counter()
        sent = self.sent_s[request_id]
        self.late_s += [now - sent[first_index + n] for n in range(count)]
        self.delivered += count
        self.first_s = self.first_s or now
        self.last_s = now


class FreeInstance:
    """Answers every Start with tokens at the offered rate; never computes anything."""

    def __init__(self, link: ZmqLink) -> None:
        self.link = link
        self.run = Run()
        self.started: dict[str, Start] = {}
        self._arrival = asyncio.Event()

    async def all_started(self, count: int) -> None:
        while len(self.started) < count:
            self._arrival.clear()
            await self._arrival.wait()

    async def listen(self) -> None:
        while True:
            _, message = await self.link.receive()
            if isinstance(message, Start):
                self.started[message.request.id] = message
                self.run.sent_s[message.request.id] = []
                self._arrival.set()
            elif isinstance(message, Abort):
                self.started.pop(message.request_id, None)

    async def heartbeat(self) -> None:
        while True:
            self.link.send(GATEWAY, Load(
                INSTANCE, Role.MIXED, InstanceState.READY, 0, 0, 0, 0, 1 << 20, 1 << 20, 16, 0, 0,
                0.001, (),
            ))  # fmt: skip
            await asyncio.sleep(0.25)

    async def stream(self, rate: float, tokens_each: int) -> None:
        """All started requests in step, a token each, at `rate` tokens a second together."""
        live = list(self.started.values())
        begin = time.perf_counter()
        for index in range(tokens_each):
            due = begin + index * len(live) / rate
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            self.send_step(live, index, last=index == tokens_each - 1)
        self.started.clear()

    def send_step(self, live: list[Start], index: int, *, last: bool) -> None:
        finish = FinishReason.LENGTH if last else None
        for first in range(0, len(live), STEP_TOKENS):
            now = time.perf_counter()
            batch = live[first : first + STEP_TOKENS]
            for start in batch:
                self.run.sent_s[start.request.id].append(now)
            self.link.send(GATEWAY, Tokens(tuple(
                Token(start.request.id, start.epoch, index, 300 + index % 100, finish)
                for start in batch
            )))  # fmt: skip


async def read_http(port: int, run: Run, request_id: str, tokens: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": tokens, "stream": True,
                       "ignore_eos": True, "seed": 1}).encode()  # fmt: skip
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"X-Request-Id: {request_id}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    seen, rest = 0, b""
    while data := await reader.read(1 << 16):
        data = rest + data
        count = data.count(b'"choices":[{')
        rest = data[-11:]
        rest = b"" if b'"choices":[{' in rest else rest
        if count:
            run.arrived(request_id, seen, count)
            seen += count
    writer.close()
    assert seen == tokens, f"{seen} of {tokens} tokens came"


async def read_grpc(channel: grpc.aio.Channel, run: Run, request_id: str, tokens: int) -> None:
    # Undecoded, so that the client's own work stays small beside the gateway's.
    method = channel.unary_stream("/tandem.v1.Inference/Generate",
        request_serializer=pb.GenerateRequest.SerializeToString)  # fmt: skip
    sampling = pb.Sampling(max_tokens=tokens, ignore_eos=True, seed=1)
    request = pb.GenerateRequest(
        request_id=request_id, tokens=pb.TokenIds(ids=[1, 2, 3]), sampling=sampling
    )
    seen = 0
    async for _ in method(request):
        run.arrived(request_id, seen, 1)
        seen += 1
    assert seen == tokens, f"{seen} of {tokens} tokens came"


async def measure(instance: FreeInstance, ports: dict, door: str, rate: float, options) -> Run:
    run = instance.run = Run()
    tokens = max(int(rate * options.seconds / options.streams), 2)
    names = [f"{door}-{int(rate)}-{n}-{time.time_ns()}" for n in range(options.streams)]
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        if door == "http":
            for name in names:
                tasks.create_task(read_http(ports["http"], run, name, tokens))
        else:
            target = f"127.0.0.1:{ports['grpc']}"
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target))
            for name in names:
                tasks.create_task(read_grpc(channel, run, name, tokens))
        await instance.all_started(options.streams)
        await instance.stream(rate, tokens)
    return run


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def offer(instance, ports, door: str, options, *, pid: int, rate: float) -> float:
    """Tokens delivered a second at an offered rate."""
    cpu_before = cpu_seconds(pid)
    run = await measure(instance, ports, door, rate, options)
    cpu_s = max(cpu_seconds(pid) - cpu_before, 0.01)
    kept = run.delivered / (run.last_s - run.first_s)
    late = statistics.quantiles(run.late_s, n=100)
    print(f"  offered {rate:6.0f}/s delivered {kept:6.0f}/s  p50 {late[49] * 1e3:7.2f} ms  "
          f"p99 {late[98] * 1e3:7.2f} ms  {run.delivered / cpu_s:6.0f} tokens per second of the "
          "gateway's processor time", flush=True)  # fmt: skip
    return kept


async def capacity(instance, ports, door: str, pid: int, options) -> None:
    print(f"{door}: {options.streams} streams, {options.seconds:g} s a rate")
    best, rate, failures = 0.0, options.first_rate, 0
    while rate <= options.last_rate and failures < options.attempts:
        kept = await offer(instance, ports, door, options, pid=pid, rate=rate)
        if kept < 0.95 * rate:
            failures += 1
        else:
            best, rate, failures = kept, rate * 1.25, 0
    half = await measure(instance, ports, door, max(best, options.first_rate) / 2, options)
    late = statistics.quantiles(half.late_s, n=100)
    print(f"  {door} keeps up with {best:.0f} tokens/s; at half of it a token takes "
          f"{late[49] * 1e3:.2f} ms at p50 and {late[98] * 1e3:.2f} ms at p99")  # fmt: skip


async def run_bench(options: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--gateway", folder]
        gateway = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            if len(cores) > 1:
                os.sched_setaffinity(gateway.pid, {cores[0]})
                os.sched_setaffinity(0, set(cores[1:]))
            link = ZmqLink(INSTANCE, f"ipc://{folder}/instance", None)
            link.connect(GATEWAY, f"ipc://{folder}/gateway")
            ports = json.loads(await gateway.stdout.readline())
            instance = FreeInstance(link)
            chores = [asyncio.create_task(instance.listen()),
                      asyncio.create_task(instance.heartbeat())]  # fmt: skip
            for door in options.doors:
                await capacity(instance, ports, door, gateway.pid, options)
            for chore in chores:
                chore.cancel()
        finally:
            gateway.kill()
            await gateway.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--doors", nargs="+", default=["http", "grpc"], choices=["http", "grpc"])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--first-rate", type=float, default=5000.0)
    parser.add_argument("--last-rate", type=float, default=60_000.0)
    parser.add_argument("--attempts", type=int, default=3, help="at a rate, on a busy machine")
    options = parser.parse_args()
    uvloop.run(run_gateway(options.gateway) if options.gateway else run_bench(options))


if __name__ == "__main__":
    main()
