"""Runs another engine on a checkpoint, in a process and environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

PROGRAMS = {name: Path(__file__).parent / f"peer_{name}.py" for name in ("transformers", "vllm")}


@dataclass(frozen=True)
class PeerRates:
    prefill_tokens_s: float
    decode_tokens_s: dict[str, float]
    """By batch size."""

    def tokens_s(self, phase: str, batch: int) -> float:
        return self.prefill_tokens_s if phase == "prefill" else self.decode_tokens_s[str(batch)]


def run_peer(
    name: str, python: Path, checkpoint: Path, threads: int, options: argparse.Namespace
) -> PeerRates:
    work = {
        "checkpoint": str(checkpoint),
        "dtype": options.dtype,
        "prompt": options.prompt,
        "context": options.context,
        "steps": options.steps,
        "batches": options.batches,
        "threads": threads,
    }
    cores = sorted(os.sched_getaffinity(0))[:threads]
    preload = preloads(python) if name == "vllm" else []
    print(f"{name}: {python}, preloading {preload or 'nothing'}", file=sys.stderr)
    told = subprocess.run(
        [str(python), str(PROGRAMS[name]), json.dumps(work)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "LD_PRELOAD": ":".join(preload)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return PeerRates(**json.loads(told.stdout.splitlines()[-1]))


def preloads(python: Path) -> list[str]:
    """What vLLM's own guide has one preload for speed, as far as it is installed."""
    threads = python.parents[1] / "lib" / "libiomp5.so"
    allocator = find_library("tcmalloc_minimal")
    return [*([allocator] if allocator else []), *([str(threads)] if threads.exists() else [])]
