"""Instances that take other shares of a GPU's multiprocessors, without a Ray or a GPU."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.config import Config
from cluster.control import keeper, launch
from cluster.control.keeper import Keeper
from cluster.control.recovery import Recovered
from cluster.control.resharing import Resharing, move_away
from cluster.roster import InstanceSpec, Kind, Member, Roster
from engine.clock import VirtualClock
from engine.errors import InstanceLost
from engine.messages import Role
from tests.cluster.test_journal import listing

ME = Member("controller", Kind.CONTROLLER, "1", "")
PREFILL, DECODE = (
    InstanceSpec(f"{role.value}-0", role, "cuda", sm_share=0.5)
    for role in (Role.PREFILL, Role.DECODE)
)


class Link:
    def connect(self, *_) -> None: ...

    def disconnect(self, *_) -> None: ...


class Starts:
    def up(self, name: str) -> None: ...

    def failed(self, name: str) -> bool:
        return False


class Workers:
    """In place of Ray's: what is launched is up at once, and lives until it is condemned."""

    def __init__(self) -> None:
        self.happened = []
        self.finished = []
        self.drains = True
        self.as_they_drain = []
        """What happens meanwhile, at one drain after another."""

    async def launch(self, launched) -> None:
        self.happened.append(("up", launched.spec.name, launched.spec.sm_share))
        name = launched.spec.name
        remote = {
            "drain": lambda: self._drain(name),
            "finish": lambda: self._finish(name),
            "ended": asyncio.Event().wait,
        }
        worker = {method: SimpleNamespace(remote=call) for method, call in remote.items()}
        launched.workers = [SimpleNamespace(**worker)]
        launched.stage = "up"

    async def _drain(self, name) -> None:
        self.happened.append(("drained", name))
        if self.as_they_drain:
            self.as_they_drain.pop(0)()
        if not self.drains:
            raise InstanceLost("it is gone")

    async def _finish(self, name) -> None:
        self.finished.append(name)


@pytest.fixture
def workers(monkeypatch):
    made = Workers()

    def nobody(*_):
        raise InstanceLost("no such worker")

    monkeypatch.setattr(keeper, "Launcher", lambda *_: made)
    monkeypatch.setattr(launch, "find_worker", nobody)
    monkeypatch.setattr(launch.ray, "kill", lambda _: None)
    return made


async def resharing_of(workers, work) -> Keeper:
    """What `work` does with a prefill and a decode instance that are up."""
    kept = Keeper(Config(), None, lambda *_, **__: None, VirtualClock(1.0))
    one = Resharing(kept, lambda *_, **__: None, drain_s=600.0, start_s=600.0)
    async with asyncio.TaskGroup() as tasks:
        kept.begin(Recovered(Roster(1, (), (PREFILL, DECODE)), ()), ME, Link(), tasks, Starts())
        for spec in (PREFILL, DECODE):
            await kept.until_up(spec, 600.0)
        workers.happened.clear()
        await work(one)
        await kept.all_gone()
    assert kept.instances == {}
    return kept


@pytest.mark.parametrize("drains", [True, False], ids=["in peace", "in haste"])
async def test_one_after_another_is_drained_and_comes_up_with_its_new_share(workers, drains):
    workers.drains = drains

    async def work(resharing):
        assert resharing.shares == {Role.PREFILL: 0.5, Role.DECODE: 0.5}
        await resharing.carry_out({Role.DECODE: 0.4, Role.PREFILL: 0.6})
        assert resharing.shares == {Role.PREFILL: 0.6, Role.DECODE: 0.4}
        new = InstanceSpec("decode-1", Role.DECODE, "cuda", sm_share=0.5)
        assert resharing.of_newcomer(new).sm_share == 0.4

    await resharing_of(workers, work)
    assert workers.happened == [
        ("drained", "decode-0"),
        ("up", "decode-0", 0.4),
        ("drained", "prefill-0"),
        ("up", "prefill-0", 0.6),
    ]
    ended_in_turn, ended_together = workers.finished[:2], workers.finished[2:]
    assert ended_in_turn == ["decode-0", "prefill-0"]
    assert sorted(ended_together) == ["decode-0", "prefill-0"]


async def test_what_has_its_share_already_and_what_is_not_wanted_any_more_is_left_alone(workers):
    async def work(resharing):
        resharing.keeper.unwant("prefill-0")
        await resharing.carry_out({Role.DECODE: 0.5, Role.PREFILL: 0.6})
        assert resharing.shares == {Role.DECODE: 0.5}

    await resharing_of(workers, work)
    assert workers.happened == []


async def test_a_role_some_of_whose_instances_have_no_share_has_none(workers):
    async def work(resharing):
        whole = InstanceSpec("decode-1", Role.DECODE, "cuda")
        resharing.keeper.desire((PREFILL, DECODE, whole))
        assert resharing.shares == {Role.PREFILL: 0.5}

    await resharing_of(workers, work)


async def test_an_instance_is_drained_until_nobody_is_to_hand_it_anything(workers):
    unrelated = listing("prefill-0", 1, "waiting")
    (waiting,) = unrelated.sequences
    awaited = replace(unrelated, sequences=(replace(waiting, target="decode-0"),))

    async def work(resharing):
        loads = resharing.keeper.loads
        loads["prefill-0"] = awaited
        workers.as_they_drain += [lambda: None, lambda: loads.update({"prefill-0": unrelated})]
        resharing.keeper.unwant("decode-0")
        await move_away(resharing.keeper, resharing.keeper.up("decode-0"), 600.0, "drained")

    await resharing_of(workers, work)
    assert workers.happened == [("drained", "decode-0")] * 2
