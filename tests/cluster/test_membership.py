import asyncio

from cluster.control.liveness import Heartbeats, RestartBudget
from cluster.links import LocalNetwork
from cluster.membership import Membership, listeners
from cluster.roster import Kind, Member, Roster


def member(name, incarnation="1", kind=Kind.INSTANCE):
    return Member(name, kind, incarnation, f"ipc:///{name}/{incarnation}")


ME = member("decode-0")


class Notes:
    """A follower that writes down what it is told."""

    def __init__(self):
        self.told = []

    async def joined(self, newcomer):
        self.told.append(("joined", newcomer.name, newcomer.incarnation))

    def lost(self, gone):
        self.told.append(("lost", gone.name, gone.incarnation))

    def updated(self, roster):
        self.told.append(("updated", roster.version))


async def follow(*rosters):
    """Everything a member is told while these rosters come in, and the versions it said it knew."""
    script, known, over = list(rosters), [], asyncio.Event()

    async def sync(me, version):
        assert me == ME
        known.append(version)
        if not script:
            over.set()
            await asyncio.Event().wait()
        return script.pop(0)

    notes = Notes()
    membership = Membership(ME, LocalNetwork().join("decode-0"), notes, sync)
    running = asyncio.create_task(membership.run())
    await over.wait()
    running.cancel()
    return notes.told, known


async def test_newcomers_are_met_before_their_version_counts_as_known():
    told, known = await follow(Roster(5, (ME, member("prefill-0"))))
    assert told == [("joined", "prefill-0", "1"), ("updated", 5)]
    assert known == [0, 5]


async def test_a_restarted_member_is_lost_before_it_joins_again():
    told, _ = await follow(
        Roster(5, (ME, member("prefill-0"))), Roster(9, (ME, member("prefill-0", "2")))
    )
    assert told[2:] == [("lost", "prefill-0", "1"), ("joined", "prefill-0", "2"), ("updated", 9)]


async def test_a_roster_without_news_changes_nothing():
    same = Roster(5, (ME, member("prefill-0")))
    told, known = await follow(same, same)
    assert len(told) == 2
    assert known == [0, 5, 5]


def test_gateways_hear_an_instance_only_once_everyone_knows_it():
    gateway = member("gateway-0", kind=Kind.GATEWAY)
    controller = member("controller", kind=Kind.CONTROLLER)
    members = (controller, ME, gateway)
    assert listeners(Roster(1, members), "decode-0") == ("controller",)
    settled = Roster(2, members, settled=("decode-0",))
    assert listeners(settled, "decode-0") == ("controller", "gateway-0")


def test_a_silent_instance_is_noticed_and_a_heartbeat_ends_the_silence():
    beats = Heartbeats(1.0)
    beats.heard("a", 0.0)
    beats.heard("b", 0.5)
    assert beats.silent(1.2) == ("a",)
    beats.heard("a", 1.2)
    assert beats.silent(1.4) == ()
    beats.forget("b")
    assert beats.silent(9.0) == ("a",)


def test_restarts_are_paced_and_end_when_the_window_is_full():
    budget = RestartBudget(restarts=4, window_s=60.0)
    assert [budget.take(float(now)) for now in range(5)] == [0.0, 0.25, 0.5, 1.0, None]
    assert budget.take(61.0) is not None
