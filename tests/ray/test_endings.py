"""How a deployment ends: streams are finished, and nothing stays behind."""

import asyncio
import os
import signal
from pathlib import Path

from tests.ray.serving import descendants, serve, until_gone
from tests.ray.streams import Reader


def socket_directories():
    return set(Path("/tmp").glob("tandem-*"))


async def test_sigterm_to_the_whole_group_finishes_streams_and_leaves_nothing(tmp_path):
    before = socket_directories()
    serving = await asyncio.to_thread(
        serve, tmp_path / "serve.log", "--mixed", "1", start_new_session=True
    )
    processes = descendants(serving.process.pid) | {serving.process.pid}
    async with serving.async_client() as client:
        readers = [Reader(client, number, 400) for number in range(4)]
        await asyncio.gather(*(reader.begun.wait() for reader in readers))
        os.killpg(serving.process.pid, signal.SIGTERM)
        await asyncio.gather(*(reader.task for reader in readers))
    assert [len(reader.tokens) for reader in readers] == [400] * 4
    assert await asyncio.to_thread(serving.process.wait, 60) == 0, serving.log.read_text()[-4000:]
    assert await asyncio.to_thread(until_gone, processes, 10.0) == set()
    assert socket_directories() == before
