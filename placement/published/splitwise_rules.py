"""Splitwise's simulator restated: its published event rules, to check ours against its figures.

Prompt and token tasks on machines with measured iteration times, iteration-level batching with
bounded preemption, KV shipped over a private link, and pools that lend machines to each other.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import BadConfig, unknown_name
from placement.published.splitwise_machine import Machine, Phase, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

LINK_BYTES_PER_S = 200 * 1024**3
LINK_RETRY_S = 1.0
PROMPT_QUEUE_TOKENS = 8192
MACHINE_MEMORY_BYTES = 8 * 80 * 1024**3


@dataclass(frozen=True, slots=True)
class Model:
    weight_bytes: int
    kv_bytes_per_token: int


MODELS = {
    "bloom-176b": Model(329_000_000_000, 2 * 14336 * 70 * 2),
    "llama2-70b": Model(135_000_000_000, 2 * 8192 * 80 * 2),
}


@dataclass(frozen=True, slots=True)
class IterationTimes:
    """Seconds of an iteration by the tokens in its batch, interpolated between measurements."""

    tokens: tuple[int, ...]
    prompt_s: tuple[float, ...]
    token_s: tuple[float, ...]

    def prompt(self, tokens: int) -> float:
        return _interpolate(self.tokens, self.prompt_s, tokens)

    def token(self, tokens: int) -> float:
        return _interpolate(self.tokens, self.token_s, tokens)

    def mixed(self, tokens: int) -> float:
        return 1.1 * self.prompt(tokens)


def _interpolate(x: Sequence[int], y: Sequence[float], at: int) -> float:
    """Linear, and along the end segments outside."""
    right = min(max(bisect_right(x, at), 1), len(x) - 1)
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + share * (y[right] - y[right - 1])


@dataclass(frozen=True, slots=True)
class Fleet:
    """`split` machines have a prompt and a token pool; otherwise all are alike."""

    model: str
    prompt_hardware: tuple[str, ...]
    token_hardware: tuple[str, ...] = ()

    @property
    def split(self) -> bool:
        return bool(self.token_hardware)


@dataclass(frozen=True, slots=True)
class Trace:
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Outcome:
    ttft_s: NDArray[np.float64]
    tbt_s: NDArray[np.float64]
    e2e_s: NDArray[np.float64]
    queue_s: NDArray[np.float64]
    completed_s: NDArray[np.float64]

    @property
    def makespan_s(self) -> float:
        return float(self.completed_s.max())


def iteration_times(model: str, hardware: str, tensor_parallel: int = 8) -> IterationTimes:
    measured = _published()
    names = {name for of, name, _ in measured if of == model}
    if hardware not in names:
        raise unknown_name("hardware", hardware, names)
    return measured[model, hardware, tensor_parallel]


@cache
def _published() -> dict[tuple[str, str, int], IterationTimes]:
    path = resources.files("placement") / "profiles" / "splitwise_machines.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        (entry["model"], entry["hardware"], entry["tensor_parallel"]): IterationTimes(
            tuple(entry["batch_tokens"]),
            tuple(ms / 1e3 for ms in entry["prompt_ms"]),
            tuple(ms / 1e3 for ms in entry["token_ms"]),
        )
        for entry in content["machines"]
    }


def simulate(fleet: Fleet, trace: Trace) -> Outcome:
    _check(fleet, trace)
    return _Simulation(fleet, trace).run()


def _check(fleet: Fleet, trace: Trace) -> None:
    if fleet.model not in MODELS:
        raise unknown_name("model", fleet.model, MODELS)
    if not fleet.prompt_hardware:
        raise BadConfig("machines", 0, "at least one")
    if len(trace.arrival_s) == 0:
        raise BadConfig("trace", 0, "holds no requests")
    if trace.output_tokens.min() < 2:
        raise BadConfig("token_size", int(trace.output_tokens.min()), "at least 2")
    model = MODELS[fleet.model]
    room = (MACHINE_MEMORY_BYTES - model.weight_bytes) // model.kv_bytes_per_token
    longest = int((trace.prompt_tokens + trace.output_tokens).max())
    if longest > room:
        raise BadConfig("context", longest, f"a machine holds {room} tokens")


class _Simulation:
    def __init__(self, fleet: Fleet, trace: Trace) -> None:
        model = MODELS[fleet.model]
        self._kv_bytes = model.kv_bytes_per_token
        self._trace = trace
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._prompt_pool = self._machines(fleet, fleet.prompt_hardware, "prompt")
        self._token_pool = self._machines(fleet, fleet.token_hardware, "token")
        self._mixed_pool: list[Machine] = []
        self._route = self._route_split if fleet.split else self._route_shortest
        count = len(trace.arrival_s)
        self._queue_s, self._ttft_s = np.zeros(count), np.zeros(count)
        self._completed_s = np.zeros(count)

    def _machines(self, fleet: Fleet, hardware: tuple[str, ...], pool: str) -> list[Machine]:
        spare = MACHINE_MEMORY_BYTES - MODELS[fleet.model].weight_bytes
        return [Machine(self, pool, iteration_times(fleet.model, name), spare) for name in hardware]

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heappush(self._events, (self.now + delay_s, self._sequence, action))

    def run(self) -> Outcome:
        arrivals = self._trace.arrival_s.tolist()
        following = 0
        while following < len(arrivals) or self._events:
            due = following < len(arrivals)
            if due and (not self._events or arrivals[following] <= self._events[0][0]):
                self.now = arrivals[following]
                self._arrive(following)
                following += 1
            else:
                self.now, _, action = heappop(self._events)
                action()
        return self._outcome()

    def _outcome(self) -> Outcome:
        e2e = self._completed_s - self._trace.arrival_s
        tbt = (e2e - self._ttft_s) / self._trace.output_tokens
        return Outcome(self._ttft_s, tbt, e2e, self._queue_s, self._completed_s)

    def _arrive(self, request: int) -> None:
        tokens = int(self._trace.prompt_tokens[request])
        outputs = int(self._trace.output_tokens[request])
        prompt = Task(request, Phase.PROMPT, tokens, (tokens + 1) * self._kv_bytes)
        token = Task(request, Phase.OUTPUT, outputs - 1, (outputs - 1) * self._kv_bytes)
        prompt.follows_on = token
        self._route(prompt, token)
        prompt.machine.arrive(prompt)
        if token.machine is prompt.machine:
            token.machine.arrive(token)

    def _route_shortest(self, prompt: Task, token: Task) -> None:
        machine = min(self._prompt_pool, key=_pending)
        prompt.machine = token.machine = machine
        machine.pending_tokens += prompt.length + 1

    def _route_split(self, prompt: Task, token: Task) -> None:
        source = self._prompt_machine(prompt)
        target = self._token_machine(prompt.kv_bytes + token.kv_bytes)
        if source is None and self._token_pool:
            source = self._lend(self._token_pool, _pending)
        if target is None and self._prompt_pool:
            target = self._lend(self._prompt_pool, _promised)
        if source is None or target is None:
            everyone = self._prompt_pool + self._mixed_pool + self._token_pool
            source = target = min(everyone, key=_pending)
        prompt.machine, token.machine = source, target
        if source is not target:
            source.promised_bytes += prompt.kv_bytes
        target.promised_bytes += prompt.kv_bytes + token.kv_bytes
        source.pending_tokens += prompt.length
        target.pending_tokens += 1

    def _prompt_machine(self, prompt: Task) -> Machine | None:
        for pool in (self._prompt_pool, self._mixed_pool):
            if pool:
                best = min(pool, key=_pending)
                crowded = best.pending_tokens + prompt.length > PROMPT_QUEUE_TOKENS
                if not (best.has_pending and crowded):
                    return best
        return None

    def _token_machine(self, kv_bytes: int) -> Machine | None:
        for pool in (self._token_pool, self._mixed_pool):
            if pool:
                best = min(pool, key=_promised)
                if best.promised_bytes + kv_bytes < best.spare_bytes:
                    return best
        return None

    def _lend(self, pool: list[Machine], load: Callable[[Machine], int]) -> Machine:
        machine = min(pool, key=load)
        pool.remove(machine)
        self._mixed_pool.append(machine)
        return machine

    def machine_idle(self, machine: Machine) -> None:
        if machine in self._mixed_pool:
            self._mixed_pool.remove(machine)
            home = self._prompt_pool if machine.pool == "prompt" else self._token_pool
            home.append(machine)

    def started(self, task: Task) -> None:
        if task.phase is Phase.PROMPT:
            self._queue_s[task.request] = self.now - self._trace.arrival_s[task.request]

    def completed(self, task: Task) -> None:
        if task.phase is Phase.OUTPUT:
            task.machine.pending_tokens -= 1
            self._completed_s[task.request] = self.now
            self._free(task.machine, task.request)
            return
        task.machine.pending_tokens -= task.length
        self._ttft_s[task.request] = self.now - self._trace.arrival_s[task.request]
        token = task.follows_on
        assert token is not None
        if token.machine is not task.machine:
            self._ship(task, token)

    @staticmethod
    def _free(machine: Machine, request: int) -> None:
        freed = machine.held_bytes.pop(request)
        machine.used_bytes -= freed
        machine.promised_bytes -= freed

    def _ship(self, prompt: Task, token: Task) -> None:
        """KV crosses once the target has room for it; a second later if not."""
        target = token.machine
        if target.used_bytes + prompt.kv_bytes > target.spare_bytes:
            self.at(LINK_RETRY_S, lambda: self._ship(prompt, token))
            return
        target.hold(prompt.request, prompt.kv_bytes)
        size = prompt.kv_bytes - self._kv_bytes
        self.at(size / LINK_BYTES_PER_S, lambda: self._shipped(prompt, token))

    def _shipped(self, prompt: Task, token: Task) -> None:
        self._free(prompt.machine, prompt.request)
        token.machine.arrive(token)
        prompt.machine.room_freed()


def _pending(machine: Machine) -> int:
    return machine.pending_tokens


def _promised(machine: Machine) -> int:
    return machine.promised_bytes
