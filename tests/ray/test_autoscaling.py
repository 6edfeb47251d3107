"""A policy in force on a real cluster: it grows, shrinks, a bad one changes nothing, and it ends:
streams are finished, and nothing stays behind."""

import asyncio
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from engine.errors import BadInput
from tests.ray.serving import PATIENCE_S, SMALL, descendants, serve, until_gone
from tests.ray.streams import Reader, until

CONFIG = f"""
pools: {{prefill: {{instances: 1}}, decode: {{instances: 1}}}}
limits: {{drain_s: {PATIENCE_S:g}}}
{SMALL}
"""
POLICY = """\
budget_accelerators: 4
metrics_interval_s: 0.2
look_back_period_s: 1
upscale_delay_s: 0
downscale_delay_s: 0
cooldown_s: 0
roles:
  decode: {{min_replicas: {least}, max_replicas: {most}}}
"""


@pytest.fixture(scope="module")
def temporary():
    """Short, as socket paths must be."""
    directory = Path(tempfile.mkdtemp(prefix="t"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    file = tmp_path_factory.mktemp("policy") / "policy.yaml"
    file.write_text(POLICY.format(least=2, most=3))
    return file


@pytest.fixture(scope="module")
def fleet(policy, temporary):
    """In a process group of its own; the last test ends it."""
    config = policy.with_name("config.yaml")
    config.write_text(CONFIG)
    serving = serve(
        policy.with_name("serve.log"),
        *(str(config), "--policy", str(policy)),
        start_new_session=True,
        TMPDIR=str(temporary),
    )
    yield serving
    assert serving.end() == 0, serving.log.read_text()[-4000:]


def ready(client, role):
    return [i.id for i in client.status().instances if i.role == role and i.state == "ready"]


async def test_a_policy_grows_and_shrinks_the_fleet_and_a_bad_one_changes_nothing(fleet, policy):
    with fleet.client() as client:
        await until(lambda: len(ready(client, "decode")) >= 2)
        with pytest.raises(BadInput, match="below min_replicas"):
            client.apply_policy(POLICY.format(least=2, most=1))
        before = client.status().policy.version
        policy.write_text(POLICY.format(least=2, most=2))
        await until(lambda: client.status().policy.version != before)
        changes = client.apply_policy(POLICY.format(least=1, most=1))
        assert "roles: changed" in changes
        await until(lambda: len(client.status().instances) == 2)
        await until(lambda: len(ready(client, "decode")) == 1)
        assert ready(client, "prefill") == ["prefill-0"]
        assert len(client.generate("Once upon a time", max_tokens=8).token_ids) == 8


async def test_sigterm_to_the_whole_group_finishes_streams_and_leaves_nothing(fleet, temporary):
    assert list(temporary.glob("tandem-*"))
    processes = descendants(fleet.process.pid) | {fleet.process.pid}
    async with fleet.async_client() as client:
        readers = [Reader(client, number, 400) for number in range(4)]
        await asyncio.gather(*(reader.has() for reader in readers))
        os.killpg(fleet.process.pid, signal.SIGTERM)
        await asyncio.gather(*(reader.task for reader in readers))
    assert [len(reader.tokens) for reader in readers] == [400] * 4
    status = await asyncio.to_thread(fleet.process.wait, PATIENCE_S)
    assert status == 0, fleet.log.read_text()[-4000:]
    assert await asyncio.to_thread(until_gone, processes) == set()
    assert list(temporary.glob("tandem-*")) == []
