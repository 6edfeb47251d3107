"""How a deployment ends: streams are finished, and nothing stays behind."""

import asyncio
import os
import shutil
import signal
import tempfile
from functools import partial
from pathlib import Path

import pytest

from tests.ray.serving import PATIENCE_S, descendants, serve, until_gone
from tests.ray.streams import Reader

CONFIG = f"""
pools: {{prefill: {{instances: 0}}, decode: {{instances: 0}}, mixed: {{instances: 1}}}}
limits: {{drain_s: {PATIENCE_S:g}}}
"""


@pytest.fixture
def temporary():
    """Short, as socket paths must be."""
    directory = Path(tempfile.mkdtemp(prefix="t"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


async def test_sigterm_to_the_whole_group_finishes_streams_and_leaves_nothing(tmp_path, temporary):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    serving = await asyncio.to_thread(
        partial(serve, start_new_session=True, TMPDIR=str(temporary)),
        *(tmp_path / "serve.log", str(config)),
    )
    assert list(temporary.glob("tandem-*"))
    processes = descendants(serving.process.pid) | {serving.process.pid}
    async with serving.async_client() as client:
        readers = [Reader(client, number, 400) for number in range(4)]
        await asyncio.gather(*(reader.has() for reader in readers))
        os.killpg(serving.process.pid, signal.SIGTERM)
        await asyncio.gather(*(reader.task for reader in readers))
    assert [len(reader.tokens) for reader in readers] == [400] * 4
    status = await asyncio.to_thread(serving.process.wait, PATIENCE_S)
    assert status == 0, serving.log.read_text()[-4000:]
    assert await asyncio.to_thread(until_gone, processes) == set()
    assert list(temporary.glob("tandem-*")) == []
