"""Real engines over a link that alters one byte: the transfer ends with what disagreed, and the
answer is the one of an engine alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cluster.instance.comparing import Comparing
from cluster.instance.mover import RankMover, rank_name
from engine.messages import Role
from kvtransfer.transport import Pool
from placement.routing.router import Route
from tests.cluster.engines import Engine, engine
from tests.cluster.movers import DirectPeers
from tests.cluster.test_instance_engine import TOKENS, VOCAB, EngineScene, alone, ask
from tests.engine import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "sampled"


class Altering:
    """A transport whose next pull flips one bit of what has arrived."""

    def __init__(self, transport, pool: Pool) -> None:
        self._transport, self._pool = transport, pool
        self.armed = False

    def __getattr__(self, name: str):
        return getattr(self._transport, name)

    def pull(self, peer, copies):
        pull = self._transport.pull(peer, copies)
        pull.wait(30.0)
        if self.armed:
            self.armed = False
            self._pool.bytes()[copies.target_offsets[0] + 5] ^= 1
        return pull


def compare_with(one: Engine, movers: dict[str, RankMover]) -> Altering:
    """Puts an altering transport under an engine's rank, and lets it compare checksums."""
    rank, me = one.first, rank_name(one.name, 0)
    pool = Pool.of_tensor(rank.runner.kv.memory)
    altering = Altering(rank.transport, pool)
    comparing = Comparing(one.layout, 0, pool, DirectPeers(me, movers))
    rank.mover = movers[me] = RankMover(one.layout, 0, altering, comparing=comparing)
    return altering


class ComparingScene(EngineScene):
    def __init__(self, *arguments, **options) -> None:
        self.mismatches: list[str] = []
        super().__init__(*arguments, **options)
        self._settings = replace(
            self._settings, transfer=replace(self._settings.transfer, checksums=True)
        )
        for name in self._roles:
            self._boot(name)

    def _compare_blocks(self, node, source, order):
        error = node.model.engine.pull(order)
        if error is not None:
            self.mismatches.append(f"{type(error).__name__}: {error}")
        return error

    def _migrated(self, migrated) -> None:
        """Moves once only, and may fail."""


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    directory: Path = tmp_path_factory.mktemp("engine") / "tiny"
    tiny.make("llama3", directory, vocab_size=VOCAB)
    meet = tmp_path_factory.mktemp("meet")
    with (
        engine(directory, meet / "a", "decode-0") as first,
        engine(directory, meet / "b", "decode-1") as second,
    ):
        first.meet(second)
        second.meet(first)
        yield {one.name: one for one in (first, second)}


@pytest.fixture
def altering(engines: dict[str, Engine]) -> Altering:
    """The link to decode-1."""
    movers: dict[str, RankMover] = {}
    compare_with(engines["decode-0"], movers)
    return compare_with(engines["decode-1"], movers)


def play(engines: dict[str, Engine], route: Route, **roles: Role) -> ComparingScene:
    wanted = {NAME: [drawn.token for drawn in alone(engines["decode-0"], ask(NAME))]}
    scene = ComparingScene(engines, wanted, seed=1)
    for name, node in scene.nodes.items():
        node.instance.set_role(roles.get(name.replace("-", "_"), node.instance.role))
    scene.ask_for(NAME, route)
    if route.decode is None:
        scene.at_token(NAME, 4, lambda: scene.migrate(NAME, "decode-0", "decode-1"))
    scene.play()
    assert scene.finished == {NAME: TOKENS}
    assert not scene.gateways["gateway-0"].failed
    return scene


def check_one_mismatch(scene: ComparingScene) -> None:
    (named,) = scene.mismatches
    assert re.fullmatch(
        r"ChecksumMismatch: blocks [\d, ]+ of decode-0/0 in decode-1/0: "
        r"source sent 0x[0-9a-f]{8}, target holds 0x[0-9a-f]{8}",
        named,
    )


def test_a_hand_off_with_one_altered_byte_is_replayed(engines, altering):
    altering.armed = True
    scene = play(engines, Route("decode-0", "decode-1"), decode_0=Role.PREFILL)
    check_one_mismatch(scene)
    assert scene.seen["Start"] == 2


def test_a_migration_with_one_altered_byte_leaves_the_request_where_it_was(engines, altering):
    altering.armed = True
    scene = play(engines, Route("decode-0"))
    check_one_mismatch(scene)
    assert scene.outcomes == ["ChecksumMismatch"]
    assert scene.seen["Start"] == 1


def test_what_arrives_whole_is_compared_and_used(engines, altering):
    scene = play(engines, Route("decode-0"))
    assert scene.mismatches == []
    assert scene.outcomes == ["committed"]
