from cluster.roster import (
    Changes,
    InstanceSpec,
    Kind,
    Member,
    Roster,
    RosterBook,
    Seat,
    changes,
    next_name,
)
from engine.messages import Role


def member(name, incarnation="1", kind=Kind.INSTANCE):
    return Member(name, kind, incarnation, f"ipc:///{name}")


def book_of(*members):
    book = RosterBook(Roster(100))
    for one in members:
        book.join(one, 0.0)
    return book


def test_every_change_is_a_new_version():
    book = book_of(member("a"), member("b"))
    assert book.roster.version == 102
    assert not book.join(member("a"), 0.0)
    assert book.roster.version == 102
    assert book.leave("a")
    assert not book.leave("a")
    assert [m.name for m in book.roster.members] == ["b"]


def test_a_restarted_member_is_both_lost_and_joined():
    old = book_of(member("a"), member("b")).roster
    new = book_of(member("a", "2"), member("b")).roster
    assert changes(old, new) == Changes((member("a"),), (member("a", "2"),))


def test_a_member_that_only_missed_versions_sees_the_difference():
    book = book_of(member("a"))
    old = book.roster
    book.join(member("b"), 0.0)
    book.leave("b")
    book.join(member("c"), 0.0)
    assert changes(old, book.roster) == Changes((), (member("c"),))


def test_a_newcomer_is_settled_once_everyone_has_caught_up():
    book = book_of(member("gateway-0", kind=Kind.GATEWAY), member("prefill-0"))
    book.join(member("decode-0"), 0.0)
    version = book.roster.version
    book.heard("gateway-0", version)
    book.heard("decode-0", version)
    assert not book.settle(1.0)
    book.heard("prefill-0", version)
    assert book.settle(1.0)
    assert "decode-0" in book.roster.settled


def test_one_slow_member_does_not_hold_up_a_newcomer_for_ever():
    book = book_of(member("gateway-0", kind=Kind.GATEWAY), member("decode-0"))
    assert not book.settle(4.9)
    assert book.settle(5.1)
    assert book.roster.settled == ("decode-0", "gateway-0")


def test_a_restarted_member_must_settle_again():
    book = book_of(member("a"))
    book.settle(10.0)
    book.join(member("a", "2"), 11.0)
    assert book.roster.settled == ()


def test_names_count_up_and_gaps_are_filled():
    assert next_name(Role.DECODE, []) == "decode-0"
    assert next_name(Role.DECODE, ["decode-0", "decode-2"]) == "decode-1"
    assert next_name(Role.DECODE, ["decode-0", "prefill-1"]) == "decode-1"


def test_a_member_tells_on_which_node_each_of_its_stages_lies():
    spec = InstanceSpec("decode-0", Role.DECODE, "cpu", tensor_parallel=2, pipeline_parallel=2)
    seats = tuple(Seat(rank, 1, node, "cpu") for rank, node in enumerate("aabb"))
    assert Member("decode-0", Kind.INSTANCE, "1", "", spec, seats).stage_nodes == "a b"
    assert member("gateway-0", kind=Kind.GATEWAY).stage_nodes == ""
