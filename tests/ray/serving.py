"""`tandem serve` as its user meets it: a process, its ready line and its signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.access import Access
from cluster.client import AsyncClient, Client

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 600.0
"""Before a test says that something hangs; no machine is so slow that it needs as long."""
LOOK_S = 0.02
SMALL = "engine: {kv_bytes: 268435456, warm_up_tokens: 16, warm_up_sequences: 2}"
"""KV for more tokens than any test has under way, in a pool that is soon made."""
RAY_SETTINGS = {
    # Ray kills workers on a machine whose memory is nearly full, be it with others' processes.
    "RAY_memory_monitor_refresh_ms": "0",
    # And it gives a process a minute to start, which a slow machine may need.
    "RAY_worker_register_timeout_seconds": f"{PATIENCE_S:.0f}",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{PATIENCE_S:.0f}",
    # What is served meets Ray as its users' does, whatever the tests themselves are kept from.
    "RAY_ENABLE_AUTO_CONNECT": "1",
}


@dataclass
class Serving:
    process: subprocess.Popen[str]
    log: Path
    http: str
    grpc: str

    def client(self) -> Client:
        return Client(Access(self.grpc))

    def async_client(self) -> AsyncClient:
        return AsyncClient(Access(self.grpc))

    def pids(self, instance: str) -> list[int]:
        with self.client() as client:
            found = next(i for i in client.status().instances if i.id == instance)
        return [worker.pid for worker in found.workers]

    def controller_pid(self) -> int:
        """Of the controller's present incarnation."""
        (pid,) = (pid for pid in descendants(self.process.pid) if is_controller(pid))
        return pid

    def kill_worker(self, instance: str, rank: int = 0) -> None:
        os.kill(self.pids(instance)[rank], signal.SIGKILL)

    def end(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


def serve(
    log: Path,
    *arguments: str,
    inside: tuple[str, ...] = (),
    start_new_session: bool = False,
    **environment: str,
) -> Serving:
    """Starts it and waits for the ready line; `inside` is a command that runs another."""
    command = [*inside, sys.executable, "-m", "cluster", "serve", "--device", "cpu"]
    command += ["--http-port", "0", "--grpc-port", "0", *arguments]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=start_new_session,
            env={**os.environ, **RAY_SETTINGS, **environment},
        )
    line = ready_line(process, log)
    fields = dict(part.split("=", 1) for part in line.split()[1:])
    return Serving(process, log, fields["http"], fields["grpc"])


def ready_line(process: subprocess.Popen[str], log: Path) -> str:
    """Whatever else it prints before; Ray brings what its workers print whenever it can."""
    assert process.stdout is not None
    alarm = threading.Timer(PATIENCE_S, process.kill)
    alarm.start()
    try:
        for line in process.stdout:
            if line.startswith("ready "):
                return line
    finally:
        alarm.cancel()
    raise AssertionError(f"it did not get ready:\n{log.read_text()[-4000:]}")


def metric(serving: Serving, name: str) -> float:
    """The sum of all series whose name and labels begin like this."""
    with urllib.request.urlopen(f"{serving.http}/metrics", timeout=PATIENCE_S) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def descendants(ancestor: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found: set[int] = set()
    fresh = {ancestor}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""


def is_controller(pid: int) -> bool:
    return command_of(pid).startswith(b"ray::Controller")


def wait_for(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> bool:
    """Whether it came to pass; between two looks others have the processor."""
    deadline, pause = time.monotonic() + within_s, threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(LOOK_S)
    return True


def until_gone(pids: set[int], within_s: float = PATIENCE_S) -> set[int]:
    """Those of the processes that are still there after the wait."""
    left = set(pids)

    def gone() -> bool:
        left.intersection_update({pid for pid in left if command_of(pid)})
        return not left

    wait_for(gone, within_s)
    return left
