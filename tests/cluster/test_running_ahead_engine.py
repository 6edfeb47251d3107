"""A host over a real engine whose steps stay on its device, kernels in Triton's interpreter."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cluster.instance.host import Host
from cluster.instance.instance import Instance, InstanceSettings
from cluster.instance.mover import InstanceMover
from cluster.links import LocalNetwork
from engine.blocks import BlockPool
from engine.clock import SystemClock
from engine.messages import Role, Start, Tokens
from engine.request import Request, Sampling
from tests.cluster.serving import PATIENCE_S, until
from tests.engine import tiny
from tests.engine.conftest import tiny_checkpoint  # noqa: F401  # a fixture
from tests.engine.test_whole_steps import BLOCK_TOKENS, Staying, runner_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.batch import Batch, Launch, StepResult
    from engine.runner import Runner

BLOCKS = 48
REQUESTS = [
    Request(
        f"r{n}",
        tuple(tiny.prompt(4 + 3 * n, seed=n)),
        Sampling(max_tokens=6 + 3 * n, temperature=0.7 * n, seed=n),
    )
    for n in range(3)
]


class Counting:
    """The runner, and how often a batch was launched while another was under way."""

    def __init__(self, runner: Runner, *, launches: bool) -> None:
        self._runner, self._launches = runner, launches
        self.ahead = self._under_way = 0

    def execute(
        self, batch: Batch, on_layer_group: Callable[[int], None] | None = None
    ) -> StepResult:
        assert not self._under_way
        return self._runner.execute(batch, on_layer_group)

    @property
    def launch(self) -> Launch | None:
        return self._launch if self._launches else None

    def _launch(self, batch: Batch) -> Callable[[], StepResult] | None:
        assert self._runner.launch is not None
        collect = self._runner.launch(batch)
        if collect is None:
            return None
        self.ahead += self._under_way
        self._under_way += 1

        def collected() -> StepResult:
            self._under_way -= 1
            return collect()

        return collected


async def answers(
    directory: Path, eos: frozenset[int], *, launches: bool
) -> tuple[dict[str, list[int]], int]:
    """What each request is answered with, and how many batches ran ahead."""
    network, pool = LocalNetwork(), BlockPool(BLOCKS, BLOCK_TOKENS)
    gateway, runner = network.join("gateway-0"), runner_of(directory, Staying())
    settings = InstanceSettings()
    instance = Instance("mixed-0", Role.MIXED, pool, runner.layout, settings=settings, eos=eos)
    executor, told = Counting(runner, launches=launches), dict[str, list[int]]()
    for request in REQUESTS:
        instance.receive("gateway-0", Start(request, 1), 0.0)
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(PATIENCE_S):
        host = Host(
            instance,
            executor=executor,
            link=network.join("mixed-0"),
            mover=InstanceMover([], tasks),
            clock=SystemClock(),
        )
        running, finished = tasks.create_task(host.run()), 0
        while finished < len(REQUESTS):
            _, message = await gateway.receive()
            assert isinstance(message, Tokens)
            for token in message.tokens:
                told.setdefault(token.request_id, []).append(token.token)
                finished += token.finish is not None
        await until(lambda: pool.available == BLOCKS)
        running.cancel()
    runner.close()
    return told, executor.ahead


def until_the_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


async def test_answers_are_the_same_whether_or_not_steps_run_ahead(
    tiny_checkpoint: Callable[[str], Path],  # noqa: F811  # the fixture
) -> None:
    directory = tiny_checkpoint("llama3")
    told, ahead = await answers(directory, frozenset(), launches=False)
    assert ahead == 0
    end = told["r1"][4]
    wanted = {name: until_the_end(tokens, end) for name, tokens in told.items()}
    got, ahead = await answers(directory, frozenset((end,)), launches=True)
    assert got == wanted
    assert ahead > 4
