"""A side of a migration is killed while it goes on: no reader notices, and the next one works."""

import os
import signal
from contextlib import suppress

import pytest

from engine.errors import BadInput, NotFound
from tests.ray.streams import (
    ENDLESS,
    Reader,
    all_ready,
    holds_nothing,
    moved,
    read_all,
    started_anew,
    until,
)

SOURCE, TARGET = "decode-0", "decode-1"


def move_all(cluster):
    """Asks for every request of the source to move, unless it has left by itself."""
    with cluster.client() as client:
        for one in client.status().requests:
            if one.decode == SOURCE:
                with suppress(NotFound, BadInput):
                    client.migrate(one.id, TARGET)


async def the_next_migration_works(cluster):
    await until(holds_nothing(cluster))
    async with cluster.async_client() as client:
        reader = Reader(client, 0, ENDLESS)
        await reader.has()
        (running,) = (await client.status()).requests
        await until(moved(cluster, running.id, (SOURCE, TARGET)))
        await reader.has(len(reader.tokens) + 20)
        await reader.leave()
    await until(holds_nothing(cluster))


@pytest.mark.parametrize("victim", [SOURCE, TARGET])
async def test_a_side_that_is_killed_before_the_commit_costs_no_token_and_no_later_migration(
    cluster, undisturbed, victim
):
    pids = cluster.pids(victim)
    (target_pid,) = cluster.pids(TARGET)

    def kill_while_the_target_stands_still():
        os.kill(target_pid, signal.SIGSTOP)
        move_all(cluster)
        os.kill(pids[0], signal.SIGKILL)
        if victim != TARGET:
            os.kill(target_pid, signal.SIGCONT)

    assert await read_all(cluster, disturb=kill_while_the_target_stands_still) == undisturbed
    await until(started_anew(cluster, victim, pids))
    await until(all_ready(cluster))
    await the_next_migration_works(cluster)


async def test_a_target_that_is_killed_at_whatever_moment_costs_no_token_and_no_later_migration(
    cluster, undisturbed
):
    pids = cluster.pids(TARGET)

    def kill_at_once():
        move_all(cluster)
        os.kill(pids[0], signal.SIGKILL)

    assert await read_all(cluster, disturb=kill_at_once) == undisturbed
    await until(started_anew(cluster, TARGET, pids))
    await until(all_ready(cluster))
    await the_next_migration_works(cluster)
