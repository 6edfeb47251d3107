"""An instance of two ranks: one dead rank takes all of it down, and all of it comes back."""

import asyncio
import os
import signal

import pytest

from tests.ray.serving import SMALL, serve
from tests.ray.streams import Reader, holds_nothing, started_anew, until

CONFIG = f"""
model: demo
pools:
  prefill: {{instances: 1}}
  decode: {{instances: 1, tensor_parallel: 2}}
limits: {{answer_s: 10}}
gateway: {{journal: {{reroute_s: 600}}}}
{SMALL}
"""


@pytest.fixture
def cut(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    serving = serve(tmp_path / "serve.log", str(path))
    yield serving
    assert serving.end() == 0, serving.log.read_text()[-4000:]


async def read(cluster, tokens, kill=None):
    async with cluster.async_client() as client:
        readers = [Reader(client, number, tokens) for number in range(2)]
        if kill is not None:
            await asyncio.gather(*(reader.has() for reader in readers))
            os.kill(kill, signal.SIGKILL)
        await asyncio.gather(*(reader.task for reader in readers))
    return [reader.tokens for reader in readers]


async def test_a_dead_rank_costs_a_pause(cut):
    undisturbed = await read(cut, 60)
    pids = await asyncio.to_thread(cut.pids, "decode-0")
    _, second = pids
    assert await read(cut, 60, kill=second) == undisturbed
    await until(started_anew(cut, "decode-0", pids))
    await until(holds_nothing(cut))
