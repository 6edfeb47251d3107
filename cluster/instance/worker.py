"""One Ray actor per accelerator: a rank of an instance; rank 0 leads and hosts the instance."""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import ray

from cluster.collector import spare_what_is_loaded
from cluster.config import Config
from cluster.instance.leading import Leading
from cluster.instance.mover import rank_name
from cluster.instance.rank import free_meeting, lead_ranks, load_rank
from cluster.instance.step_log import StepLog
from cluster.instance.warm_up import warm_up, warm_up_batches
from cluster.roster import Roster, Seat
from cluster.thread_names import PASSES, name_thread
from cluster.watching.logs import set_up_logging
from engine.errors import InstanceLost

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from cluster.instance.coded import Staged, StageRequest
    from cluster.instance.comparing import CompareRequest
    from cluster.instance.leading import Network
    from cluster.instance.rank import LoadedRank
    from cluster.instance.serving import ServeRequest
    from cluster.roster import InstanceSpec
    from engine.batch import Executor
    from engine.messages import Role
    from kvtransfer.transfer import PullOrder

log = logging.getLogger(__name__)

LAST_WORDS_S = 0.5
"""Between telling the controller of a failure and ending the process."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a controller that has just started learns from a worker that it finds."""

    spec: InstanceSpec
    rank: int
    leads: bool
    roster: Roster


class Worker:
    """The actor. Every method but `ended` returns soon or within its caller's bound."""

    def __init__(self, config: str, spec: InstanceSpec, rank: int, network: Network) -> None:
        set_up_logging()
        self._config = Config.model_validate_json(config)
        self._spec, self._rank, self._network = spec, rank, network
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="rank", initializer=name_thread, initargs=(PASSES,)
        )
        self._loaded: LoadedRank | None = None
        self._executor: Executor | None = None
        self._step_log: StepLog | None = None
        self._progress = 0.0
        self._leading: Leading | None = None
        self._work: asyncio.Future[None] | None = None
        self._over = asyncio.Event()
        self._failure: InstanceLost | None = None

    # Starting.

    async def meeting(self) -> str:
        return free_meeting(ray.util.get_node_ip_address())

    async def load(self, meeting: str) -> Seat:
        loop = asyncio.get_running_loop()
        one_host = self._network.directory is not None
        load = partial(
            load_rank,
            self._config,
            self._spec,
            self._rank,
            meeting,
            one_host=one_host,
            progress=self._got_on,
        )
        self._loaded = await loop.run_in_executor(self._thread, load)
        node = ray.get_runtime_context().get_node_id()
        return Seat(self._rank, os.getpid(), node, self._loaded.device)

    async def warm_up(self) -> None:
        """Rank 0, once the others follow: runs what a first request must not wait for."""
        loop = asyncio.get_running_loop()
        loaded, engine = self._rank_loaded, self._config.engine
        self._progress = 0.0
        self._executor = await loop.run_in_executor(self._thread, lead_ranks, loaded.runner)
        batches = warm_up_batches(
            loaded.blocks,
            engine.block_tokens,
            engine.warm_up_tokens,
            engine.warm_up_sequences,
            longest=loaded.checkpoint.max_length,
        )
        work = partial(warm_up, self._executor, batches, self._got_on)
        await loop.run_in_executor(self._thread, work)

    async def lead(self, seats: tuple[Seat, ...]) -> None:
        """Rank 0: hosts the instance from now on."""
        assert self._executor is not None, "not warmed up"
        logs = self._config.engine.step_log
        if logs is not None:
            path = logs / f"{self._spec.name}-{os.getpid()}.csv"
            self._executor = self._step_log = StepLog(self._executor, path)
        self._leading = Leading(
            self._config,
            self._spec,
            self._rank_loaded,
            executor=self._executor,
            seats=seats,
            network=self._network,
        )
        self._start(self._leading.run(self))

    async def follow(self) -> None:
        """The other ranks: run the leader's batches from now on."""
        from engine.parallel_runner import follow

        loop = asyncio.get_running_loop()
        runner = self._rank_loaded.runner
        self._start(loop.run_in_executor(self._thread, follow, runner))

    # Watching.

    async def progress(self) -> float:
        """The share that is done of the loading, or of the warm-up after it."""
        return self._progress

    def _got_on(self, done: int, whole: int) -> None:
        self._progress = done / whole

    async def ended(self) -> None:
        """Returns when this worker has stopped; raises what broke it."""
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    async def ping(self) -> None:
        """An answer is all that is asked for."""

    async def describe(self) -> Description:
        roster = self._leading.membership.roster if self._leading else Roster(0)
        return Description(self._spec, self._rank, self._leading is not None, roster)

    # Operating.

    async def drain(self) -> None:
        """Returns once nothing is left to do here."""
        await self._leader.drain()

    async def set_role(self, role: Role) -> None:
        self._leader.set_role(role)

    async def finish(self) -> None:
        """Writes what only memory holds; the process is killed next."""
        if self._step_log is not None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._step_log.write)

    # KV, called by the leader of this instance and by ranks of others.

    async def metadata(self, peer: str) -> bytes:
        return self._rank_loaded.mover.metadata(peer)

    async def serve(self, request: ServeRequest) -> None:
        self._rank_loaded.mover.serve(request)

    async def stage(self, request: StageRequest) -> Staged:
        return await self._rank_loaded.mover.stage(request)

    async def unstage(self, ticket: int) -> None:
        self._rank_loaded.mover.unstage(ticket)

    async def checksum(self, request: CompareRequest) -> int:
        return await self._rank_loaded.mover.checksum(request)

    async def meet(self, instance: str, ranks: int) -> None:
        """Makes the pools of another instance's ranks reachable."""
        await self._rank_loaded.mover.meet([rank_name(instance, rank) for rank in range(ranks)])

    async def part(self, instance: str, ranks: int) -> None:
        for rank in range(ranks):
            peer = rank_name(instance, rank)
            await asyncio.to_thread(self._rank_loaded.mover.disconnect, peer)

    async def pull(self, order: PullOrder) -> None:
        await self._rank_loaded.mover.pull(order)

    async def cancel(self, transfer: str) -> None:
        await self._rank_loaded.mover.cancel(transfer)

    @property
    def _rank_loaded(self) -> LoadedRank:
        assert self._loaded is not None, "not loaded"
        return self._loaded

    @property
    def _leader(self) -> Leading:
        assert self._leading is not None, "does not lead"
        return self._leading

    def _start(self, work: Awaitable[None]) -> None:
        spare_what_is_loaded()
        self._work = asyncio.ensure_future(self._until_the_end(work))

    async def _until_the_end(self, work: Awaitable[None]) -> None:
        """The process's boundary: whatever ends the work ends the worker."""
        try:
            await work
        except Exception as error:
            log.exception("worker failed instance=%s rank=%d", self._spec.name, self._rank)
            self._failure = InstanceLost(f"{self._spec.name}/{self._rank}: {error!r}")
            asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)
        finally:
            self._close()
            self._over.set()

    def _close(self) -> None:
        if self._step_log is not None:
            self._step_log.close()
        if self._leading is not None:
            self._leading.close()
        self._rank_loaded.transport.close()
        self._rank_loaded.runner.kv.close()
