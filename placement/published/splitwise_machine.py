"""One machine of Splitwise's simulator: what it batches, when it stops early, whom it preempts."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_BATCH_TASKS = 512
MAX_BATCH_TOKENS = 2048
MAX_PREEMPTIONS = 4


class Phase(Enum):
    PROMPT = "prompt"
    OUTPUT = "output"


class TaskState(Enum):
    QUEUED = "queued"
    RUNNING = "running"
    BLOCKED = "blocked"


@dataclass(slots=True, eq=False)
class Task:
    """A request's prompt (its tokens in one iteration) or its output (one token in each)."""

    request: int
    phase: Phase
    length: int
    kv_bytes: int
    machine: Machine = field(init=False)
    follows_on: Task | None = None
    generated: int = 0
    preemptions: int = 0
    state: TaskState = TaskState.QUEUED

    @property
    def iteration_tokens(self) -> int:
        return self.length if self.phase is Phase.PROMPT else 1

    @property
    def remaining(self) -> int:
        return 1 if self.phase is Phase.PROMPT else self.length - self.generated


class Times(Protocol):
    def prompt(self, tokens: int) -> float: ...
    def token(self, tokens: int) -> float: ...
    def mixed(self, tokens: int) -> float: ...


class Cluster(Protocol):
    now: float

    def at(self, delay_s: float, action: Callable[[], None]) -> None: ...
    def started(self, task: Task) -> None: ...
    def completed(self, task: Task) -> None: ...
    def machine_idle(self, machine: Machine) -> None: ...


class Machine:
    def __init__(self, cluster: Cluster, pool: str, times: Times, spare_bytes: int) -> None:
        self._cluster = cluster
        self._times = times
        self.pool = pool
        self.spare_bytes = spare_bytes
        self.used_bytes = 0
        self.held_bytes: dict[int, int] = {}
        self.promised_bytes = 0
        self.pending_tokens = 0
        self._pending: list[Task] = []
        """By preemptions, then arrival."""
        self._pending_prompts: dict[Task, None] = {}
        self._blocked: dict[Task, None] = {}
        self._tasks: dict[int, list[Task]] = {}
        self._requests: list[int] = []
        """With a task here, by arrival."""
        self._batch: dict[Task, None] = {}
        self._batch_tokens = 0
        self._batch_prompts = 0
        self._run = 0
        """Number of the current run of iterations; a superseded end event finds another."""
        self._started_s = 0.0
        self._iteration_s = 0.0
        self._iterations = 0
        self._stopping = False

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def hold(self, request: int, kv_bytes: int) -> None:
        self.used_bytes += kv_bytes
        self.held_bytes[request] = self.held_bytes.get(request, 0) + kv_bytes

    def arrive(self, task: Task) -> None:
        if task.request in self._tasks:
            self._tasks[task.request].append(task)
        else:
            self._tasks[task.request] = [task]
            insort(self._requests, task.request)
        self._add_pending(task)
        if not self._batch:
            if self._fits(task, self.used_bytes):
                self._start()
        elif self._would_join(task):
            self._stop_early()

    def room_freed(self) -> None:
        """A KV cache has left."""
        if not self._pending:
            return
        if not self._batch:
            if self._fits(self._pending[0], self.used_bytes):
                self._start()
        elif len(self._batch) < MAX_BATCH_TASKS and self._batch_tokens < MAX_BATCH_TOKENS:
            self._stop_early()

    def _fits(self, task: Task, used_bytes: int) -> bool:
        return used_bytes + task.kv_bytes <= self.spare_bytes

    def _would_join(self, task: Task) -> bool:
        room = self._batch_tokens + task.iteration_tokens <= MAX_BATCH_TOKENS
        if len(self._batch) < MAX_BATCH_TASKS and room:
            return True
        if task.phase is Phase.OUTPUT or self._batch_prompts == len(self._batch):
            return False
        prompt_tokens = self._batch_tokens - (len(self._batch) - self._batch_prompts)
        return prompt_tokens + task.length <= MAX_BATCH_TOKENS

    def _add_pending(self, task: Task) -> None:
        insort(self._pending, task, key=_urgency)
        if task.phase is Phase.PROMPT:
            self._pending_prompts[task] = None

    def _remove_pending(self, task: Task) -> None:
        """Preemption counts change while tasks wait, so their order may no longer hold."""
        index = bisect_left(self._pending, _urgency(task), key=_urgency)
        if index >= len(self._pending) or self._pending[index] is not task:
            index = next(i for i, other in enumerate(self._pending) if other is task)
        del self._pending[index]
        self._pending_prompts.pop(task, None)
        self._blocked.pop(task, None)

    def _stop_early(self) -> None:
        """Ends the run of iterations with the current one, unless it holds a prompt."""
        if self._stopping or self._batch_prompts:
            return
        self._stopping = True
        elapsed_s = self._cluster.now - self._started_s
        self._iterations = int(elapsed_s // self._iteration_s) + 1
        self._schedule_end(self._iterations * self._iteration_s - elapsed_s)

    def _schedule_end(self, delay_s: float) -> None:
        self._run += 1
        run = self._run
        self._cluster.at(delay_s, lambda: self._end(run))

    def _end(self, run: int) -> None:
        if run == self._run:
            self._complete()

    def _complete(self) -> None:
        done = []
        for task in self._batch:
            task.generated += self._iterations
            if task.phase is Phase.PROMPT or task.generated == task.length:
                done.append(task)
        for task in done:
            self._leave(task)
            self._cluster.completed(task)
        self._stopping = False
        self._start()

    def _leave(self, task: Task) -> None:
        del self._batch[task]
        self._batch_prompts -= task.phase is Phase.PROMPT
        tasks = self._tasks[task.request]
        tasks.remove(task)
        if not tasks:
            del self._tasks[task.request]
            del self._requests[bisect_left(self._requests, task.request)]

    def _start(self) -> None:
        self._change_batch(self._select())
        for request in self._requests:
            first = self._tasks[request][0]
            if first not in self._batch:
                first.preemptions += 1
        if not self._batch:
            if not self._requests:
                self._cluster.machine_idle(self)
            return
        self._iteration_s = self._duration_s()
        self._iterations = min(task.remaining for task in self._batch)
        for task in self._batch:
            self._run_task(task)
        self._started_s = self._cluster.now
        self._schedule_end(self._iterations * self._iteration_s)

    def _run_task(self, task: Task) -> None:
        if task.state is TaskState.QUEUED:
            self.hold(task.request, task.kv_bytes)
            self._cluster.started(task)
        task.state = TaskState.RUNNING

    def _duration_s(self) -> float:
        tokens = sum(task.iteration_tokens for task in self._batch)
        if self._batch_prompts == 0:
            return self._times.token(tokens)
        if self._batch_prompts == len(self._batch):
            return self._times.prompt(tokens)
        return self._times.mixed(tokens)

    def _change_batch(self, selected: dict[Task, None]) -> None:
        for task in [task for task in self._batch if task not in selected]:
            task.state = TaskState.BLOCKED
            del self._batch[task]
            self._add_pending(task)
            self._blocked[task] = None
        for task in selected:
            if task not in self._batch:
                self._remove_pending(task)
                self._batch[task] = None
                self._batch_prompts += task.phase is Phase.PROMPT

    def _select(self) -> dict[Task, None]:
        selection = _Selection(self.spare_bytes, self.used_bytes)
        if self._pending:
            overdue = self._overdue()
            selection.take(overdue, wait_for_memory=False)
            selection.take(self._pending_prompts)
            selection.take(self._blocked)
        selection.take(self._batch)
        if self._pending:
            left = (r for r in self._requests if r not in selection.requests)
            selection.take(self._tasks[request][0] for request in left)
        self._batch_tokens = selection.tokens
        return selection.tasks

    def _overdue(self) -> list[Task]:
        overdue = []
        for task in self._pending:
            if task.preemptions < MAX_PREEMPTIONS:
                break
            overdue.append(task)
        return overdue


class _Selection:
    """The next batch as it fills: bounded in tasks, tokens and memory."""

    def __init__(self, spare_bytes: int, used_bytes: int) -> None:
        self.tasks: dict[Task, None] = {}
        self.tokens = 0
        self.requests: set[int] = set()
        self._room = spare_bytes - used_bytes

    def take(self, candidates: Iterable[Task], *, wait_for_memory: bool = True) -> None:
        for task in candidates:
            if len(self.tasks) == MAX_BATCH_TASKS:
                return
            if self.tasks and self.tokens + task.iteration_tokens > MAX_BATCH_TOKENS:
                return
            if task.request in self.requests:
                continue
            if task.state is TaskState.QUEUED:
                if task.kv_bytes > self._room:
                    if wait_for_memory:
                        return
                    continue
                self._room -= task.kv_bytes
            self.tasks[task] = None
            self.requests.add(task.request)
            self.tokens += task.iteration_tokens


def _urgency(task: Task) -> tuple[int, int]:
    return task.preemptions, task.request
