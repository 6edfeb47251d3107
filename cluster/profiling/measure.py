"""Measures one rank of a model on this machine: passes of its engine, and copies of its KV."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from cluster.profiling.copies import copy_times
from cluster.profiling.neighbours import busy_neighbours
from cluster.profiling.one_rank import Rank, RankSettings
from cluster.profiling.passes import Pass, passes_of
from cluster.profiling.serving import LOAD, Serving, loads_of, measure_serving
from cluster.profiling.timing import samples_of
from engine.errors import BadConfig, Unsupported
from engine.parallel import join
from engine.parallel_runner import ParallelRunner, follow
from placement.latency.catalog import device_names
from placement.latency.catalog import find_device as find_in_catalog

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.synchronize import Event

    from engine.parallel import Parallel

    Progress = Callable[[int, int], None]

REQUEST_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Device:
    torch_name: str
    """cpu or cuda."""
    catalog_name: str


@dataclass(frozen=True, slots=True)
class Measuring:
    model: str
    device: Device
    threads: int = 1
    dtype: str = "auto"
    kv_dtype: str = "auto"
    rounds: int = 7
    quick: bool = False
    neighbours: int = 0
    """Passes are also measured while so many other instances compute."""
    serving: int = 0
    """How many times servers are measured, too."""
    tensor_parallel: int = 1
    """Passes are also measured over so many ranks of this machine."""
    seed: int = 0
    """Of the requests to servers."""

    @property
    def rank(self) -> RankSettings:
        device = self.device.torch_name
        return RankSettings(self.model, device, self.threads, self.dtype, self.kv_dtype)

    @property
    def servers(self) -> tuple[int, ...]:
        """Mixed instances of each that is measured."""
        if not self.serving:
            return ()
        return (1, self.neighbours + 1) if self.neighbours else (1,)


def find_device(wanted: str, catalog_name: str | None) -> Device:
    if wanted not in ("auto", "cpu", "cuda"):
        raise BadConfig("device", wanted, "must be auto, cpu or cuda")
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise Unsupported("device cuda: this machine has no GPU that torch can use")
    name = "cpu" if wanted == "cpu" or not has_gpu else "cuda"
    if catalog_name is not None:
        return Device(name, find_in_catalog(catalog_name).name)
    return Device(name, "cpu-core" if name == "cpu" else _gpu_name(torch.cuda.get_device_name()))


def _gpu_name(reported: str) -> str:
    """The catalog's name all parts of which the driver's name holds; the longest if several do."""
    parts = reported.lower().replace("-", " ").split()
    known = [name for name in device_names() if set(name.split("-")) <= set(parts)]
    if not known:
        rule = f"not in the catalog: name one of {', '.join(device_names())} with --device-name"
        raise BadConfig("device-name", reported, rule)
    return max(known, key=len)


def measure(settings: Measuring, progress: Progress) -> dict[str, Any]:
    """The profile as it is written to a file."""
    if settings.tensor_parallel > 1 and settings.device.torch_name != "cpu":
        raise Unsupported("profile --tensor-parallel: several workers are measured on CPUs only")
    if settings.serving and settings.device.torch_name != "cpu":
        raise Unsupported("profile --serving: a server is measured on CPUs only")
    rank = Rank(settings.rank)
    try:
        passes = _passes(settings, rank)
        stages = _Stages(progress, len(passes) * (settings.rounds + 1), settings)
        run: dict[str, Any] = {
            **rank.description,
            **samples_of(passes, rank.timer.run(passes, settings.rounds, stages.alone)),
        }
        if settings.neighbours:
            with busy_neighbours(settings.neighbours, partial(compute_for_ever, settings)):
                seconds = rank.timer.run(passes, settings.rounds, stages.beside)
            run["beside"] = {"neighbours": settings.neighbours, **samples_of(passes, seconds)}
        transfer = copy_times(rank.runner.kv, settings.rounds)
        request_s = _request_s(rank) if settings.serving else 0.0
    finally:
        rank.runner.close()
    runs = [run]
    if settings.tensor_parallel > 1:
        runs.append(_cut_run(settings, stages.cut))
    layout = rank.layout
    token_bytes = layout.block_bytes(0) // layout.block_tokens
    served: dict[str, Any] = {}
    if settings.serving:
        copies = tuple((one["bytes"], one["seconds"]) for one in transfer)
        serving = Serving(
            settings.rank,
            settings.servers,
            rank.max_length,
            request_s,
            copies,
            token_bytes,
            rounds=settings.serving,
            seed=settings.seed,
        )
        served = measure_serving(serving, stages.served)
    return {
        "model": _name_of(settings.model),
        "device": settings.device.catalog_name,
        "dtype": rank.dtype,
        "kv_dtype": layout.dtype,
        "threads": settings.threads,
        "kv_bytes_per_token": token_bytes,
        "runs": runs,
        "transfer": transfer,
        **served,
    }


class _Stages:
    """How much of all is done, over the stages of a measurement."""

    def __init__(self, progress: Progress, steps: int, settings: Measuring) -> None:
        self._progress, self._steps = progress, steps
        self._uncut = steps * (2 if settings.neighbours else 1)
        self._passes = self._uncut + steps * (settings.tensor_parallel > 1)
        self._loads = loads_of(settings.servers, settings.serving)
        self._load_steps = self._passes // max(self._loads, 1)

    @property
    def _total(self) -> int:
        return self._passes + self._loads * self._load_steps

    def alone(self, done: int) -> None:
        self._progress(done, self._total)

    def beside(self, done: int) -> None:
        self._progress(self._steps + done, self._total)

    def cut(self, done: int) -> None:
        self._progress(self._uncut + done, self._total)

    def served(self, done: int) -> None:
        self._progress(self._passes + done * self._load_steps, self._total)


def _request_s(rank: Rank) -> float:
    """How long the median request of a server's load takes by itself."""
    prompt = min(LOAD.prompt_tokens, rank.max_length - 1)
    passes = [Pass(((prompt, 0),)), Pass(contexts=(prompt,))]
    prefill_s, decode_s = rank.timer.run(passes, REQUEST_ROUNDS, lambda _: None)
    return prefill_s + LOAD.output_tokens * decode_s


def _passes(settings: Measuring, rank: Rank) -> list[Pass]:
    grid = passes_of(rank.max_length, quick=settings.quick)
    return [one for one in grid if rank.timer.holds(one)]


def compute_for_ever(settings: Measuring, begun: Event) -> None:
    """A neighbour: the same passes, over and over, until it is killed."""
    rank = Rank(settings.rank)
    passes = _passes(settings, rank)
    begun.set()
    while True:
        rank.timer.run(passes, 1, lambda _: None)


def _cut_run(settings: Measuring, progress: Callable[[int], None]) -> dict[str, Any]:
    """The same passes over several ranks, of which this process is the first."""
    size = settings.tensor_parallel
    with TemporaryDirectory() as directory, ExitStack() as others:
        meeting = f"file://{directory}/meeting"
        for number in range(1, size):
            work = partial(follow_first, settings, number, meeting)
            others.enter_context(busy_neighbours(1, work))
        rank = Rank(settings.rank, _join(settings, 0, meeting))
        leading = ParallelRunner(rank.runner)
        try:
            passes = _passes(settings, rank)
            seconds = rank.timer_of(leading).run(passes, settings.rounds, progress)
        finally:
            leading.close()
            rank.runner.close()
    return {**rank.description, **samples_of(passes, seconds)}


def follow_first(settings: Measuring, number: int, meeting: str, begun: Event) -> None:
    """A rank that computes what the first one does."""
    begun.set()
    parallel = _join(settings, number, meeting)
    rank = Rank(settings.rank, parallel)
    follow(rank.runner)


def _join(settings: Measuring, number: int, meeting: str) -> Parallel:
    return join(
        number,
        tensor_size=settings.tensor_parallel,
        stages=1,
        init_method=meeting,
        device=torch.device(settings.device.torch_name),
    )


def _name_of(model: str) -> str:
    """As the planner calls the model."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() and model != "demo" else Path(model).name.lower()
