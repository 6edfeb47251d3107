"""Hand-off of a prompt's KV between two processes that share a GPU, alone and during its prefill.

    python scripts/bench/gpu_handoff.py --output figures.jsonl [--shape 8b] [--tokens 8192]
        [--device cuda|cpu] [--rounds 5]

Prints what a plain copy of as many bytes on the device takes in the same run, what a pull of the
prompt from the other process's pool takes between scattered blocks, and how much later the last
byte is there than the prefill ends when layer groups are pulled as they are written. To reach: 80%
of the copy's rate, and less than 5% added to the prefill. `--device cpu` shows that it works.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from engine.batch import Batch, Chunk
from engine.blocks import blocks_for
from engine.checkpoint import open_checkpoint
from engine.kvcache import KvCache
from engine.runner import Runner
from engine.sampler import Sampler
from kvtransfer.auto import AutoTransport
from kvtransfer.plan import plan_rank
from kvtransfer.transport import Pool, checksum
from scripts.bench.gpu import BLOCK_TOKENS, GREEDY, KNOWN_SHAPES, Records, settle, write_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from engine.layout import KvLayout
    from kvtransfer.plan import Copies
    from kvtransfer.transport import Pull
    from scripts.bench.gpu import Figures

LAYER_GROUPS = 4
WAIT_S = 600.0
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


@dataclass(frozen=True)
class Work:
    shape: str
    tokens: int
    device: str
    directory: str

    @property
    def blocks(self) -> int:
        return blocks_for(self.tokens, BLOCK_TOKENS)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        write_model(KNOWN_SHAPES[options.shape], DTYPES[options.device], Path(scratch))
        work = Work(options.shape, options.tokens, options.device, scratch)
        measure(work, Records(options.output), options.rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(KNOWN_SHAPES), default="8b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--device", choices=sorted(DTYPES), default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def measure(work: Work, records: Records, rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    source = context.Process(target=serve, args=(theirs, work))
    source.start()
    theirs.close()
    layout, metadata = pipe.recv()
    kv = KvCache(layout, 0, blocks=work.blocks, device=torch.device(work.device))
    target = AutoTransport("target", Pool.of_tensor(kv.memory, kv.fd))
    try:
        target.connect("source", metadata)
        bench = Bench(work, layout, kv, target, pipe, rounds)
        name = f"{work.shape} tokens={work.tokens} over={target.uses('source')}"
        records.measure(f"handoff {name}", bench.alone)
        records.measure(f"handoff overlapped {name}", bench.overlapped)
    finally:
        pipe.close()
        source.join(WAIT_S)
        target.close()
        kv.close()


def serve(pipe: Connection, work: Work) -> None:
    """The source: prefills when it is told to, and tells of each layer group."""
    checkpoint = open_checkpoint(work.directory)
    runner = Runner(
        checkpoint,
        sampler=Sampler(checkpoint.config.vocab),
        device=work.device,
        blocks=work.blocks,
        block_tokens=BLOCK_TOKENS,
        layer_groups=LAYER_GROUPS,
    )
    pool = Pool.of_tensor(runner.kv.memory, runner.kv.fd)
    source = AutoTransport("source", pool)
    pipe.send((runner.layout, source.metadata("target")))
    tokens = tuple(number % checkpoint.config.vocab for number in range(work.tokens))
    batch = Batch((Chunk("prompt", tokens, 0, tuple(range(work.blocks)), GREEDY),))
    runner.execute(batch)  # compiles
    while True:
        try:
            told = pipe.recv()
        except EOFError:
            break
        if told == "checksum":
            pipe.send(whole_checksum(pool))
            continue
        start_s = time.monotonic()
        runner.execute(batch, lambda group: pipe.send(("group", group)))
        pipe.send(("done", start_s, time.monotonic()))
    source.close()
    runner.close()


def whole_checksum(pool: Pool) -> int:
    return checksum(pool, np.array([0]), np.array([pool.nbytes]))


@dataclass(frozen=True)
class Bench:
    work: Work
    layout: KvLayout
    kv: KvCache
    target: AutoTransport
    pipe: Connection
    rounds: int

    def alone(self) -> Figures:
        """Pulls of the whole prompt and plain copies of as many bytes, in turns."""
        copies, memory = self._scattered(), self.kv.memory
        other = torch.empty_like(memory)
        copied, pulled = list[float](), list[float]()
        for _ in range(self.rounds + 1):
            copied.append(self._timed(partial(memory.copy_, other)))
            pulled.append(self._timed(lambda: self.target.pull("source", copies).wait(WAIT_S)))
        copy_s, pull_s = statistics.median(copied[1:]), statistics.median(pulled[1:])
        return {
            "bytes": float(memory.nbytes),
            "copy_s": copy_s,
            "pull_s": pull_s,
            "of_copy": statistics.median(
                copy / pull for copy, pull in zip(copied[1:], pulled[1:], strict=True)
            ),
        }

    def overlapped(self) -> Figures:
        """Prefills that nobody pulls, and prefills that are pulled meanwhile, in turns."""
        undisturbed, ttft, waits = list[float](), list[float](), list[float]()
        for _ in range(self.rounds):
            start_s, ended_s, _ = self._prefill(pulling=False)
            undisturbed.append(ended_s - start_s)
            start_s, ended_s, arrived_s = self._prefill(pulling=True)
            ttft.append(max(ended_s, arrived_s) - start_s)
            waits.append(max(arrived_s - ended_s, 0.0))
        self.pipe.send("checksum")
        pool = Pool.of_tensor(self.kv.memory, self.kv.fd)
        assert self.pipe.recv() == whole_checksum(pool), "the copy differs from its source"
        prefill_s = statistics.median(undisturbed)
        return {
            "prefill_s": prefill_s,
            "with_handoff_s": statistics.median(ttft),
            "wait_s": statistics.median(waits),
            "added_to_ttft": statistics.median(ttft) / prefill_s - 1.0,
        }

    def _prefill(self, *, pulling: bool) -> tuple[float, float, float]:
        """When it began and ended, and when the last byte had arrived."""
        self.pipe.send("prefill")
        pulls: list[Pull] = []
        arrivals = [0.0]
        while (told := self.pipe.recv())[0] == "group":
            if pulling:
                pulls.append(self.target.pull("source", self._of_group(told[1])))
                pulls[-1].add_done_callback(lambda: arrivals.append(time.monotonic()))
        for pull in pulls:
            pull.wait(WAIT_S)
            pull.cancel()  # returns once the callback has been called
        _, start_s, ended_s = told
        return start_s, ended_s, max(arrivals)

    def _of_group(self, group: int) -> Copies:
        blocks = list(range(self.work.blocks))
        layers = self.layout.layer_groups(0, LAYER_GROUPS)[group]
        (pull,) = plan_rank(self.layout, self.layout, blocks, blocks, 0, layers=layers)
        return pull.copies

    def _scattered(self) -> Copies:
        """Between block tables as they are after hours of serving."""
        ours, theirs = (
            np.random.default_rng(seed).permutation(self.work.blocks).tolist() for seed in (1, 2)
        )
        (pull,) = plan_rank(self.layout, self.layout, theirs, ours, 0)
        return pull.copies

    def _timed(self, work: Callable[[], object]) -> float:
        device = torch.device(self.work.device)
        settle(device)
        start_s = time.perf_counter()
        work()
        settle(device)
        return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
