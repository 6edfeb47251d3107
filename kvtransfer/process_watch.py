"""A watch on the life of another process of this host."""

from __future__ import annotations

import os
import select
from pathlib import Path

from engine.errors import PeerLost


def host_identity() -> str:
    """The same for processes that see each other under /proc, and for no others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def started_ticks(pid: int) -> int:
    """When a process started; with its pid, its name for as long as the host is up."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise PeerLost(f"process {pid} is gone") from error
    return int(stat.rpartition(")")[2].split()[19])


class ProcessWatch:
    def __init__(self, pid: int, started: int) -> None:
        """PeerLost where it has ended, or where the pid is another's by now."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise PeerLost(f"process {pid} is gone") from error
        try:
            _check_same(pid, started)
        except BaseException:
            os.close(self._pidfd)
            raise
        self._ended = select.poll()
        self._ended.register(self._pidfd, select.POLLIN)

    def check_alive(self) -> None:
        if self._ended.poll(0):
            raise PeerLost("the peer's process has ended")

    def close(self) -> None:
        os.close(self._pidfd)


def _check_same(pid: int, started: int) -> None:
    if started_ticks(pid) != started:
        raise PeerLost(f"process {pid} is another one than the peer")
