"""Another engine on the same checkpoint, in a process and environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

PROGRAMS = {name: Path(__file__).parent / f"peer_{name}.py" for name in ("transformers", "vllm")}


class Peer:
    """Idle until it is asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def measure(self, phase: str, batch: int) -> list[float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"phase": phase, "batch": batch}), file=self._process.stdin, flush=True)
        told = self._process.stdout.readline()
        if not told:
            raise SystemExit(f"{self._process.args!r} ended with status {self._process.wait()}")
        return [float(each) for each in json.loads(told)]


@contextmanager
def open_peer(
    name: str, python: Path, checkpoint: Path, threads: int, options: argparse.Namespace
) -> Iterator[Peer]:
    work = {
        "checkpoint": str(checkpoint),
        "dtype": options.dtype,
        "prompt": options.prompt,
        "context": options.context,
        "steps": options.steps,
        "batches": options.batches,
        "threads": threads,
    }
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
    preload = preloads(python) if name == "vllm" else []
    print(f"{name}: {python}, preloading {preload or 'nothing'}", file=sys.stderr)
    process = subprocess.Popen(
        ["taskset", "-c", cores, str(python), str(PROGRAMS[name]), json.dumps(work)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "LD_PRELOAD": ":".join(preload)},
    )
    with process:
        yield Peer(process)


def preloads(python: Path) -> list[str]:
    """What vLLM's own guide has one preload for speed, as far as it is installed."""
    threads = python.parents[1] / "lib" / "libiomp5.so"
    allocator = find_library("tcmalloc_minimal")
    return [*([allocator] if allocator else []), *([str(threads)] if threads.exists() else [])]
