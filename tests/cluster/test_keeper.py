"""Instances that do not come up, without a Ray: what is told of it, and what goes on."""

import asyncio
from dataclasses import replace

import pytest

from cluster.config import Config, LimitsConfig
from cluster.control import keeper, launch, placing
from cluster.control.keeper import Keeper
from cluster.control.launch import Launched, Launcher
from cluster.control.placing import Groups, placed
from cluster.control.recovery import Recovered
from cluster.roster import InstanceSpec, Kind, Member, Roster
from engine.clock import VirtualClock
from engine.errors import BadCheckpoint, DeadlineExceeded, InstanceLost, NotFound
from engine.messages import Role
from tests.cluster.serving import until

SPEC = InstanceSpec("decode-0", Role.DECODE, "cpu", 1, 1, (("impossible", 1.0),))


class Group:
    """A placement group that Ray finds no room for until it is told to."""

    def __init__(self) -> None:
        self.stands = asyncio.Event()

    async def ready(self) -> None:
        await self.stands.wait()


class Table:
    """What Ray says of a group, look by look; once there is no more to say, it stands."""

    def __init__(self, *states: str) -> None:
        self._states = iter(states)

    def __call__(self, group: Group) -> dict[str, object]:
        state = next(self._states, "FINISHED")
        if state == "FINISHED":
            group.stands.set()
        return {"stats": {"scheduling_state": state}}


@pytest.fixture
def removed(monkeypatch):
    groups: list[Group] = []

    def nobody(*_):
        raise InstanceLost("no such worker")

    monkeypatch.setattr(placing, "placement_group", lambda *_, **__: Group())
    monkeypatch.setattr(placing, "placement_group_table", Table(*["NO_RESOURCES"] * 1000))
    monkeypatch.setattr(placing, "remove_placement_group", groups.append)
    monkeypatch.setattr(launch, "find_worker", nobody)
    return groups


def silent(*_, **__) -> None: ...


async def placed_by(table: Table, monkeypatch) -> list[str]:
    """What is told until the group stands."""
    told: list[str] = []
    monkeypatch.setattr(placing, "placement_group_table", table)
    monkeypatch.setattr(placing, "LOOK_S", 0.0)
    await placed(Group(), SPEC, lambda *_, **fields: told.append(fields["reason"]))
    return told


async def test_what_keeps_an_instance_from_its_place_is_told_at_once_and_once(monkeypatch):
    nowhere, busy = "no node has what it wants", "others use what it wants"
    assert await placed_by(Table("QUEUED"), monkeypatch) == []
    states = ("QUEUED", "INFEASIBLE", "QUEUED", "INFEASIBLE", "NO_RESOURCES")
    assert await placed_by(Table(*states), monkeypatch) == [nowhere, busy]


async def test_an_instance_without_a_place_is_given_up_in_words_and_its_group_removed(removed):
    config = Config(limits=LimitsConfig(start_s=0.001))
    with pytest.raises(DeadlineExceeded, match=r"still placing after 0\.001 s .*impossible"):
        await Launcher(config, None, silent).launch(Launched(SPEC, Groups()))
    assert len(removed) == 1


class Link:
    def connect(self, *_) -> None: ...

    def disconnect(self, *_) -> None: ...


class Starts:
    """An autoscaler whose start has failed, unless it was somebody else's."""

    def __init__(self, *, own: bool = True) -> None:
        self.own, self.ended = own, list[str]()

    def up(self, name: str) -> None: ...

    def failed(self, name: str) -> bool:
        self.ended.append(name)
        return self.own


class WordlessLauncher:
    def __init__(self, *_) -> None: ...

    async def launch(self, _) -> None:
        raise TimeoutError


class RefusingLauncher:
    """Brings up whatever is not refused."""

    refused: frozenset[str] = frozenset()
    tried: list[str]

    def __init__(self, *_) -> None:
        type(self).tried = []

    async def launch(self, launched: Launched) -> None:
        self.tried.append(launched.spec.name)
        if launched.spec.name in self.refused:
            raise BadCheckpoint("model", "here", "no such directory on this node")
        launched.stage = "up"


def refusing(monkeypatch, *names: str) -> type[RefusingLauncher]:
    monkeypatch.setattr(RefusingLauncher, "refused", frozenset(names), raising=False)
    monkeypatch.setattr(keeper, "Launcher", RefusingLauncher)
    return RefusingLauncher


def kept_by(note, **limits) -> Keeper:
    return Keeper(Config(limits=LimitsConfig(**limits)), None, note, VirtualClock(1.0))


class Notes(list):
    """Whose, and what."""

    def __call__(self, kind, subject, text, **_) -> None:
        self.append((subject, text))


ME = Member("controller", Kind.CONTROLLER, "1", "")


async def test_once_all_are_to_go_a_late_wish_brings_nothing_back(monkeypatch, removed):
    monkeypatch.setattr(keeper, "Launcher", WordlessLauncher)
    kept = kept_by(lambda *_, **__: None)
    async with asyncio.TaskGroup() as tasks:
        kept.begin(Recovered(Roster(1), ()), ME, Link(), tasks, Starts())
        await kept.all_gone()
        kept.desire((SPEC,))
    assert kept.instances == {}
    assert kept.roster.desired == ()
    assert removed == []


async def test_large_instances_look_for_their_places_before_small_ones(monkeypatch, removed):
    order = []

    class Ordered(WordlessLauncher):
        async def launch(self, launched) -> None:
            order.append(launched.spec.name)
            await super().launch(launched)

    monkeypatch.setattr(keeper, "Launcher", Ordered)
    sizes = {"decode-0": 1, "decode-1": 4, "mixed-0": 2, "prefill-0": 8}
    specs = [
        InstanceSpec(name, Role(name[:-2]), "cuda", size, resources=(("GPU", 1.0),))
        for name, size in sizes.items()
    ]
    kept = kept_by(silent)
    async with asyncio.TaskGroup() as tasks:
        kept.begin(Recovered(Roster(1, (), tuple(specs)), ()), ME, Link(), tasks, Starts())
    assert order == ["prefill-0", "decode-1", "mixed-0", "decode-0"]


async def test_a_failure_without_words_is_told_by_its_kind_and_keeps_nothing_from_going_on(
    monkeypatch, removed
):
    monkeypatch.setattr(keeper, "Launcher", WordlessLauncher)
    told, starts = [], Starts()

    def note(kind, subject, text, **fields):
        told.append((subject, text, fields.get("reason")))

    kept = kept_by(note)
    async with asyncio.TaskGroup() as tasks:
        kept.begin(Recovered(Roster(1, (), (SPEC,)), ()), ME, Link(), tasks, starts)
    assert ("decode-0", "lost", "TimeoutError") in told
    assert starts.ended == ["decode-0"]
    assert kept.instances == {}
    assert kept.roster.desired == ()
    assert removed == []


def spec_of(name: str) -> InstanceSpec:
    return InstanceSpec(name, Role(name[:-2]), "cpu", 1, 1)


def found(*names: str) -> Recovered:
    return Recovered(Roster(1, (), tuple(map(spec_of, names))), ())


async def test_a_model_that_no_instance_can_load_is_fatal_while_nothing_has_been_served(
    monkeypatch, removed
):
    launcher, told = refusing(monkeypatch, "decode-0"), Notes()
    kept = kept_by(told)
    async with asyncio.TaskGroup() as tasks:
        begin = found("decode-0", "prefill-0")
        kept.begin(begin, ME, Link(), tasks, Starts(own=False))
        await until(lambda: ("decode-0", "given up") in told)
        assert isinstance(kept.fatal, BadCheckpoint)
        await kept.all_gone()
    assert launcher.tried == ["decode-0", "prefill-0"]
    assert removed == []


async def test_a_newcomer_that_cannot_load_the_model_costs_the_others_no_restart(
    monkeypatch, removed
):
    launcher, told = refusing(monkeypatch), Notes()
    kept = kept_by(told, restarts=1)
    async with asyncio.TaskGroup() as tasks:
        kept.begin(found("mixed-0"), ME, Link(), tasks, Starts(own=False))
        await until(lambda: ("mixed-0", "up") in told)
        refusing(monkeypatch, "mixed-1")
        kept.desire((spec_of("mixed-0"), spec_of("mixed-1")))
        await until(lambda: ("mixed-1", "given up") in told)
        assert kept.fatal is None
        assert "no such directory" in kept.given_up["mixed-1"]
        kept.instances["mixed-0"].condemn("killed")
        await until(lambda: told.count(("mixed-0", "up")) == 2)
        await kept.all_gone()
    assert launcher.tried == ["mixed-0", "mixed-1", "mixed-1", "mixed-0"]
    assert removed == []


async def test_an_instance_that_is_about_to_stop_cannot_be_wanted_otherwise(monkeypatch, removed):
    refusing(monkeypatch)
    kept, was = kept_by(silent), spec_of("decode-0")
    changed = replace(was, role=Role.MIXED)
    async with asyncio.TaskGroup() as tasks:
        kept.begin(found("decode-0"), ME, Link(), tasks, Starts())
        assert kept.change(changed)
        assert kept.roster.desired == (changed,)
        kept.unwant("decode-0")
        assert not kept.change(was)
        assert kept.roster.desired == ()
        await kept.all_gone()


async def test_a_wish_tries_what_was_given_up_again(monkeypatch, removed):
    refusing(monkeypatch)
    told = Notes()
    kept = kept_by(told, restarts=0)
    async with asyncio.TaskGroup() as tasks:
        kept.begin(found("mixed-0"), ME, Link(), tasks, Starts(own=False))
        await until(lambda: ("mixed-0", "up") in told)
        kept.instances["mixed-0"].condemn("no memory")
        await until(lambda: kept.given_up == {"mixed-0": "no memory"})
        kept.desire((spec_of("mixed-0"),))
        assert kept.given_up == {}
        await until(lambda: told.count(("mixed-0", "up")) == 2)
        await kept.all_gone()
    assert removed == []


async def test_who_is_taken_down_cannot_join_again_before_it_is_gone(monkeypatch, removed):
    refusing(monkeypatch)
    told, gone = Notes(), asyncio.Event()

    def dying(*_):
        if gone.is_set():
            raise InstanceLost("no such worker")

    monkeypatch.setattr(launch, "find_worker", dying)
    monkeypatch.setattr(launch, "GONE_POLL_S", 0.001)
    kept = kept_by(told)
    async with asyncio.TaskGroup() as tasks:
        kept.begin(found("decode-0"), ME, Link(), tasks, Starts())
        await until(lambda: ("decode-0", "up") in told)
        assert kept.admits("decode-0")
        launched = kept.instances["decode-0"]
        kept.unwant("decode-0")
        launched.dismiss("drained")
        await until(lambda: ("decode-0", "stopped") in told)
        assert kept.instances == {"decode-0": launched}
        assert not kept.admits("decode-0")
        with pytest.raises(NotFound):
            kept.up("decode-0")
        gone.set()
        await until(lambda: kept.instances == {})
        kept.desire((spec_of("decode-0"),))
        assert not kept.admits("decode-0")
        await until(lambda: kept.admits("decode-0"))
        await kept.all_gone()
