"""The first hour on a GPU: checks the kernels against plain torch and times them, all in one go.

    python scripts/bench/gpu.py --output figures.jsonl [--device cuda|cpu] [--small]
        [--shapes 0.6b,8b] [--only PART,PART]

Parts: `machine` (copy bandwidth, matrix rate), `decode` and `prefill` (the attention kernels on
ragged batches, each backend's largest difference from fp32 torch and its time), `step` (a whole
model with random weights: decode steps by batch, each launched before the tokens of the one before
it are read; prefill by length). Every figure is a line of the output file at once; run again after
an interruption, it goes on where it stopped. With
`--device cpu` the Triton kernels run in Triton's interpreter, which shows that the script works
and that the kernels are right, and whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import torch

from engine import attention, triton_attention, varlen_attention
from engine.attention import AttentionShape, KvLayer
from engine.batch import UNREAD, Batch, Chunk, Draw
from engine.blocks import blocks_for
from engine.checkpoint import open_checkpoint
from engine.packing import Packed, pack
from engine.request import Sampling
from engine.runner import Runner
from engine.sampler import Sampler
from scripts.bench.shapes import SHAPES, Shape, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from engine.batch import Collect, StepResult

    Figures = dict[str, float | str]

BLOCK_TOKENS = 16
LONGEST_TOKENS = 16384
STEPS_AHEAD = 32
"""Half of the steps that sequences take while they are timed: about their context, in the mean."""
GREEDY = Draw(Sampling(temperature=0.0, max_tokens=1 << 20, ignore_eos=True), 0, 0, ())
KNOWN_SHAPES = SHAPES | {
    "8b": Shape("8b", 4096, 32, 32, 8, 128, 14336, 128256, "llama", tied=False),
    "tiny": Shape("tiny", 64, 2, 4, 2, 16, 128, 512, "llama", tied=True),
}


@dataclass(frozen=True)
class Sizes:
    """What is run: on a GPU what it is judged by, `--small` what a CPU does in seconds."""

    copy_bytes: int = 1 << 30
    matrix: int = 8192
    heads: tuple[int, int, int] = (32, 8, 128)
    decode: tuple[tuple[int, int], ...] = tuple(
        (batch, context) for context in (1024, 4096) for batch in (1, 8, 32, 128)
    )
    prefill: tuple[tuple[int, int], ...] = ((512, 0), (2048, 0), (8192, 0), (2048, 6144))
    """New tokens and those cached before them."""
    steps: tuple[tuple[int, int], ...] = (
        *((batch, 1024) for batch in (1, 8, 32, 128, 256)),
        *((batch, 4096) for batch in (1, 32, 128)),
    )
    """Decode steps of a whole model: sequences, and the context of each."""
    step_prompts: tuple[int, ...] = (512, 2048, 8192)
    pool_bytes: int = 1 << 30
    """Layers of KV taken in turns, so that no cache holds them."""
    calls: int = 20


SMALL = Sizes(
    copy_bytes=1 << 22,
    matrix=256,
    heads=(4, 2, 32),
    decode=((1, 40), (3, 70)),
    prefill=((20, 0), (9, 30)),
    steps=((1, 32), (4, 32)),
    step_prompts=(16, 40),
    pool_bytes=1 << 20,
    calls=2,
)


class Records:
    """The figures so far, a JSON line each in a file that outlives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.of: dict[str, Figures] = {}
        for line in lines:
            figures = json.loads(line)
            self.of[figures.pop("case")] = figures

    def measure(self, case: str, measure: Callable[[], Figures]) -> None:
        if case in self.of:
            return
        self.of[case] = measure()
        with self._path.open("a") as file:
            file.write(json.dumps({"case": case, **self.of[case]}) + "\n")
        shown = " ".join(f"{name}={brief(value)}" for name, value in self.of[case].items())
        print(f"{case}: {shown}", flush=True)


def brief(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:.60}"


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    sizes = SMALL if options.small else Sizes()
    records = Records(options.output)
    records.measure("machine", partial(machine, device, sizes))
    found = records.of["machine"]
    limits = Limits(float(found["bytes_s"]), float(found["flops_s"]))
    bench = Bench(device, sizes, limits, records)
    parts = {"decode": bench.decode, "prefill": bench.prefill}
    for name in options.only:
        if name in parts:
            parts[name]()
    if "step" in options.only:
        for shape in options.shapes:
            bench.steps(KNOWN_SHAPES[shape])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--shapes", type=partial(names, KNOWN_SHAPES), default=["0.6b", "8b"])
    parts = ("decode", "prefill", "step")
    parser.add_argument("--only", type=partial(names, parts), default=list(parts))
    return parser.parse_args()


def names(known: Any, text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return chosen


@dataclass(frozen=True)
class Limits:
    """What the machine was seen to do, against which kernels are held."""

    bytes_s: float
    flops_s: float


def machine(device: torch.device, sizes: Sizes) -> Figures:
    source = torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = time_of([lambda: target.copy_(source)], sizes.calls, device)
    matrix = torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=torch.bfloat16)
    product_s = time_of([lambda: matrix @ matrix], sizes.calls, device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": named,
        "torch": torch.__version__,
        "bytes_s": 2 * sizes.copy_bytes / copy_s,
        "flops_s": 2 * sizes.matrix**3 / product_s,
    }


def time_of(calls: Sequence[Callable[[], object]], count: int, device: torch.device) -> float:
    """Seconds a call, the best of three rounds of `count`, the calls taking turns."""
    turns, best_s = cycle(calls), float("inf")
    for _ in range(len(calls) + 2):  # every call once, so that all is compiled
        next(turns)()
    for _ in range(3):
        settle(device)
        start_s = time.perf_counter()
        for _ in range(count):
            next(turns)()
        settle(device)
        best_s = min(best_s, (time.perf_counter() - start_s) / count)
    return best_s


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Scene:
    """Queries of a ragged batch, and the layers of a pool they may attend to."""

    query: torch.Tensor
    layers: list[KvLayer]
    packed: Packed
    shape: AttentionShape


@dataclass(frozen=True)
class Bench:
    device: torch.device
    sizes: Sizes
    limits: Limits
    records: Records

    @cached_property
    def dtype(self) -> torch.dtype:
        """fp32 on a CPU: the interpreter multiplies bf16 matrices wrongly."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def decode(self) -> None:
        for batch, context in self.sizes.decode:
            self._attend(f"decode batch={batch} context={context}", [(1, context - 1)] * batch)

    def prefill(self) -> None:
        for new, cached in self.sizes.prefill:
            self._attend(f"prefill new={new} cached={cached}", [(new, cached)])

    def _attend(self, case: str, spans: list[tuple[int, int]]) -> None:
        scene: Scene | None = None
        for backend, attend in backends(self.device).items():
            name = f"{case} backend={backend}"
            if name not in self.records.of:
                scene = scene or self._scene(spans)
                self.records.measure(name, partial(self._check, attend, scene, spans))

    def _scene(self, spans: list[tuple[int, int]]) -> Scene:
        heads, kv_heads, dim = self.sizes.heads
        random = torch.Generator(self.device).manual_seed(0)
        counts = [blocks_for(new + cached, BLOCK_TOKENS) for new, cached in spans]
        layer_bytes = 2 * sum(counts) * kv_heads * BLOCK_TOKENS * dim * self.dtype.itemsize
        layers = max(1, min(64, self.sizes.pool_bytes // layer_bytes))
        sizes = (sum(counts), layers, 2, kv_heads, BLOCK_TOKENS, dim)
        pool = torch.randn(sizes, generator=random, device=self.device, dtype=self.dtype)
        numbers, chunks = torch.randperm(sum(counts)).tolist(), list[Chunk]()
        for (new, cached), count in zip(spans, counts, strict=True):
            taken, numbers = numbers[:count], numbers[count:]
            chunks.append(Chunk(str(len(chunks)), (0,) * new, cached, tuple(taken), None))
        packed = pack(chunks, BLOCK_TOKENS, self.device)
        query = torch.randn(
            packed.tokens, heads, dim, generator=random, device=self.device, dtype=self.dtype
        )
        views = [KvLayer(pool[:, i, 0], pool[:, i, 1]) for i in range(layers)]
        return Scene(query, views, packed, AttentionShape(dim**-0.5))

    def _check(self, attend: Any, scene: Scene, spans: list[tuple[int, int]]) -> Figures:
        first = scene.layers[0]
        exact = replace(first, key=first.key.float(), value=first.value.float())
        args = (scene.packed, scene.shape)
        wanted = attention.paged_attention(scene.query.float(), exact, *args)
        error = (
            attend(scene.query, first, *args).float() - wanted
        ).abs().max() / wanted.abs().max()
        calls = [partial(attend, scene.query, layer, *args) for layer in scene.layers]
        time_s = time_of(calls, self.sizes.calls, self.device)
        heads, kv_heads, dim = self.sizes.heads
        keys = sum(new + cached for new, cached in spans)
        pairs = sum(new * cached + new * (new + 1) / 2 for new, cached in spans)
        moved = (2 * keys * kv_heads + 2 * scene.packed.tokens * heads) * dim * self.dtype.itemsize
        return {
            "largest_error": error.item(),
            "time_s": time_s,
            "of_bandwidth": moved / time_s / self.limits.bytes_s,
            "of_peak": 4 * pairs * heads * dim / time_s / self.limits.flops_s,
        }

    def steps(self, shape: Shape) -> None:
        sizes, dtype = self.sizes, str(self.dtype).removeprefix("torch.")
        cases = list(step_cases(shape, sizes, dtype))
        if all(case.name in self.records.of for case in cases):
            return
        most = max(batch * table_blocks(context) for batch, context in sizes.steps)
        blocks = max(most, blocks_for(max(sizes.step_prompts), BLOCK_TOKENS))
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            write_model(shape, dtype, directory)
            runner = Runner(
                open_checkpoint(scratch),
                sampler=Sampler(shape.vocab),
                device=str(self.device),
                blocks=blocks,
                block_tokens=BLOCK_TOKENS,
            )
        runner.kv.memory.zero_()
        for case in cases:
            self.records.measure(case.name, partial(self._step, runner, case))

    def _step(self, runner: Runner, case: StepCase) -> Figures:
        with case.work(runner) as again:
            time_s = time_of([again], self.sizes.calls, self.device)
        return {
            "time_s": time_s,
            "of_bandwidth": case.moved / time_s / self.limits.bytes_s,
            "of_peak": case.flops / time_s / self.limits.flops_s,
        }


@dataclass(frozen=True)
class StepCase:
    name: str
    work: Callable[[Runner], AbstractContextManager[Callable[[], object]]]
    """What a runner is asked for, again and again."""
    moved: float
    """Bytes that it must read."""
    flops: float


class Decoding:
    """Sequences that go on by what they draw, as an instance has them go on: where the runner takes
    a step behind another, that one's tokens are read once the next has been launched."""

    def __init__(self, runner: Runner, count: int, context: int) -> None:
        self._runner, self._at, self._place = runner, context - STEPS_AHEAD, 0
        each = table_blocks(context)
        self._tables = [tuple(range(i * each, (i + 1) * each)) for i in range(count)]
        self.tokens = [1] * count
        self._under_way: Collect | None = None

    def __enter__(self) -> Callable[[], None]:
        return self._step

    def __exit__(self, *_: object) -> None:
        self._read()

    def _step(self) -> None:
        launch = self._runner.launch
        following = None if launch is None else launch(self._batch())
        self._read()
        if following is None:
            self._told(self._runner.execute(self._batch()))
        else:
            self._under_way, self.tokens = following, [UNREAD] * len(self._tables)
        self._at, self._place = self._at + 1, self._place + 1

    def _batch(self) -> Batch:
        draw, held = replace(GREEDY, position=self._place), self._at // BLOCK_TOKENS + 1
        chunks = (
            Chunk(str(i), (token,), self._at, table[:held], draw)
            for i, (token, table) in enumerate(zip(self.tokens, self._tables, strict=True))
        )
        return Batch(tuple(chunks))

    def _read(self) -> None:
        collect, self._under_way = self._under_way, None
        if collect is not None:
            self._told(collect())

    def _told(self, result: StepResult) -> None:
        self.tokens = [one.token for one in result.drawn]


def table_blocks(context: int) -> int:
    return blocks_for(context + STEPS_AHEAD, BLOCK_TOKENS)


def write_model(shape: Shape, dtype: str, directory: Path) -> None:
    """A checkpoint of random weights that takes the longest prompts of these benches."""
    write_checkpoint(shape, dtype, directory)
    config = json.loads((directory / "config.json").read_text())
    longer = config | {"max_position_embeddings": LONGEST_TOKENS}
    (directory / "config.json").write_text(json.dumps(longer))


def backends(device: torch.device) -> dict[str, Any]:
    """Whatever can attend here: our own kernels, and torch's where this release has them."""
    found: dict[str, Any] = {"triton": triton_attention.paged_attention}
    if device.type == "cuda" and varlen_attention.missing_from_torch() is None:
        found["varlen_attn"] = varlen_attention.paged_attention
    return found


def step_cases(shape: Shape, sizes: Sizes, dtype: str) -> Iterator[StepCase]:
    for count, context in sizes.steps:
        name = f"step {shape.name} decode batch={count} context={context}"
        moved, flops = shape.step_bytes(dtype, count, context), shape.flops(count, context, count)
        work = partial(Decoding, count=count, context=context)
        yield StepCase(name, work, moved, flops)
    for prompt in sizes.step_prompts:
        table = tuple(range(blocks_for(prompt, BLOCK_TOKENS)))
        batch = Batch((Chunk("p", (1,) * prompt, 0, table, GREEDY),))
        name = f"step {shape.name} prefill tokens={prompt}"
        moved, flops = shape.step_bytes(dtype, 1, prompt), shape.flops(prompt, prompt / 2, 1)
        yield StepCase(name, partial(_again, batch), moved, flops)


def _again(batch: Batch, runner: Runner) -> AbstractContextManager[Callable[[], object]]:
    return nullcontext(partial(runner.execute, batch))


if __name__ == "__main__":
    main()
