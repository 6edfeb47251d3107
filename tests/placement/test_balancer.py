from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import InstanceState, Load, Role, Running
from placement.balancing.balancer import Balancer
from placement.balancing.settings import BalancerSettings
from placement.balancing.standing import virtual_blocks
from placement.view import InstanceView, View

BLOCK = 16
TOTAL = 1000


def running(name: str, blocks: int, priority: int = 0, state: str = "running") -> Running:
    return Running(name, 2, state, priority, blocks * BLOCK - 8, 8, blocks)


def waiting(name: str, blocks: int, state: str = "offered") -> Running:
    return Running(name, 2, state, 0, blocks * BLOCK, 0, 0)


def load(name: str, *sequences: Running, state: InstanceState = InstanceState.READY) -> Load:
    held = sum(one.blocks for one in sequences)
    batch = [one for one in sequences if one.state == "running"]
    return Load(
        instance=name, role=Role(name.split("-", maxsplit=1)[0]), state=state, queue_requests=0,
        queued_tokens=0, running_sequences=len(batch),
        running_tokens=sum(one.prompt_tokens + one.output_tokens for one in batch),
        free_blocks=TOTAL - held, total_blocks=TOTAL, block_tokens=BLOCK, pinned_blocks=0,
        cached_blocks=0, step_s=0.02, sequences=sequences,
    )  # fmt: skip


def view(*loads: Load, now: float = 0.0) -> View:
    return View(now, tuple(InstanceView(one) for one in sorted(loads, key=lambda x: x.instance)))


def crowd(prefix: str, count: int, blocks: int, priority: int = 0) -> tuple[Running, ...]:
    return tuple(running(f"{prefix}{number}", blocks, priority) for number in range(count))


def full(name: str) -> Load:
    return load(name, *crowd(f"{name}/", 9, 110))


def draining(one: Load) -> Load:
    return replace(one, state=InstanceState.DRAINING)


def test_nothing_moves_where_there_is_nothing():
    assert Balancer().decide(view()) == ()
    assert Balancer().decide(view(load("decode-0"))) == ()
    assert Balancer().decide(view(full("decode-0"))) == ()


def test_an_instance_that_runs_short_is_relieved_by_the_freest():
    seen = view(full("decode-0"), load("decode-1", running("x", 300)), load("decode-2"))
    first, *_ = Balancer().decide(seen)
    assert (first.source, first.target, first.reason) == ("decode-0", "decode-2", "balance")


def small(name: str, *sequences: Running, total: int = 100) -> Load:
    held = sum(one.blocks for one in sequences)
    return replace(load(name, *sequences), total_blocks=total, free_blocks=total - held)


def test_a_request_about_to_outgrow_its_instance_goes_to_a_larger_one():
    seen = view(small("decode-0", running("long", 94)), load("decode-1", running("x", 700)))
    (move,) = Balancer().decide(seen)
    assert (move.request_id, move.target, move.reason) == ("long", "decode-1", "outgrow")


def test_a_request_outgrows_nothing_where_no_instance_is_larger_or_has_the_room():
    grown = small("decode-0", running("long", 94))
    assert Balancer().decide(view(grown, small("decode-1"))) == ()
    crowded = load("decode-1", running("x", 910))
    assert Balancer().decide(view(grown, crowded)) == ()


def test_evening_out_leaves_newcomers_their_share_of_the_target():
    full_one, target = full("decode-0"), load("decode-1", running("x", 500))
    assert Balancer(BalancerSettings(newcomer_share=0.4)).decide(view(full_one, target)) == ()
    (move,) = Balancer(BalancerSettings(newcomer_share=0.3)).decide(view(full_one, target))
    assert (move.source, move.target, move.reason) == ("decode-0", "decode-1", "balance")


def test_balanced_instances_stay_as_they_are():
    balancer = Balancer()
    for now in range(100):
        evenly = [load(f"decode-{n}", *crowd(f"{n}/", 9, 100)) for n in range(4)]
        assert balancer.decide(view(*evenly, now=now)) == ()


def test_prefill_instances_take_no_running_request():
    assert Balancer().decide(view(full("decode-0"), load("prefill-0"))) == ()


def test_the_least_urgent_moves_first():
    urgent = BalancerSettings(headroom_blocks=0)
    sequences = (*crowd("u", 5, 110, priority=1), *crowd("n", 4, 110))
    moves = Balancer(urgent).decide(view(load("decode-0", *sequences), load("decode-1")))
    assert moves
    assert all(move.request_id.startswith("n") for move in moves)


def test_an_instance_is_relieved_until_the_high_mark_and_not_again_before_the_low_one():
    options = BalancerSettings(low_steps=128.0, high_steps=256.0)
    between = load("decode-0", *crowd("a", 8, 115))  # (1000 - 920) * 16 / 8 = 160 steps
    balancer = Balancer(options)
    assert balancer.decide(view(between, load("decode-1"))) == ()
    pressed = load("decode-0", *crowd("a", 8, 120))
    assert balancer.decide(view(pressed, load("decode-1"), now=1.0))
    # Its moves have failed: it still is between the marks, and still wants relief.
    assert balancer.decide(view(between, load("decode-1"), now=20.0))


def test_a_scattered_hole_is_made_one_for_a_long_prompt_that_waits():
    seen = view(
        load("decode-0", *crowd("a", 3, 200), waiting("long", 500)),
        load("decode-1", *crowd("b", 3, 200)),
    )
    options = BalancerSettings(low_steps=0.0, high_steps=10.0)
    moves = Balancer(options).decide(seen)
    assert [(m.source, m.target, m.reason) for m in moves] == [
        ("decode-0", "decode-1", "defragment")
    ]


def test_where_something_waits_everywhere_the_smallest_hole_is_made_first():
    seen = view(
        load("decode-0", *crowd("a", 18, 50), waiting("large", 400)),
        load("decode-1", *crowd("b", 18, 50), waiting("small", 110)),
        load("decode-2", *crowd("c", 18, 50), waiting("medium", 250)),
    )
    moves = Balancer(BalancerSettings(hole_steps=10.0)).decide(seen)
    assert [(m.source, m.reason) for m in moves] == [("decode-1", "defragment")]


def test_a_hole_that_is_about_to_be_filled_is_not_used_to_make_another():
    seen = view(
        load("decode-0", *crowd("a", 6, 100), waiting("fits", 300)),
        load("decode-1", *crowd("b", 9, 100), waiting("waits", 200)),
    )
    only_holes = BalancerSettings(low_steps=0.0, high_steps=1e9)
    assert Balancer(only_holes).decide(seen) == ()


@pytest.mark.parametrize("state", ["waiting", "swapped"])
def test_where_a_sequence_gave_way_nothing_else_is_sent(state):
    gave_way = Running("gave-way", 2, state, 0, 6000, 8, 0)
    seen = view(
        load("decode-0", *crowd("a", 6, 100), gave_way),
        load("decode-1", *crowd("b", 9, 100), waiting("waits", 200)),
    )
    assert not [move for move in Balancer().decide(seen) if move.target == "decode-0"]


@pytest.mark.parametrize("state", ["waiting", "swapped"])
def test_no_hole_is_made_for_what_gave_way(state):
    gave_way = Running("gave-way", 2, state, 0, 500 * BLOCK - 8, 8, 0)
    new = waiting("new", 500)
    only_holes = BalancerSettings(low_steps=-1e9, high_steps=10.0)
    for one, reasons in ((new, ["defragment"]), (gave_way, [])):
        seen = view(load("decode-0", *crowd("a", 3, 200), one), load("decode-1"))
        assert [move.reason for move in Balancer(only_holes).decide(seen)] == reasons


def test_an_urgent_request_finds_its_headroom():
    options = BalancerSettings(low_steps=0.0, high_steps=10.0, headroom_blocks=200)
    urgent = running("urgent", 100, priority=5)
    seen = view(load("decode-0", urgent, *crowd("n", 8, 105)), load("decode-1"))
    moves = Balancer(options).decide(seen)
    assert moves
    assert all(m.reason == "isolate" and m.request_id != "urgent" for m in moves)


def test_headroom_of_the_urgent_makes_an_instance_look_fuller():
    options = BalancerSettings(headroom_blocks=64)
    plain, urgent = load("decode-0", running("a", 10)), load("decode-0", running("a", 10, 1))
    assert virtual_blocks(urgent, urgent.sequences, options) == 64 + virtual_blocks(
        plain, plain.sequences, options
    )


def test_a_drained_instance_empties_and_takes_nothing():
    balancer = Balancer()
    here = {f"a{n}": running(f"a{n}", 40) for n in range(20)}
    there: dict[str, Running] = {}
    for now in range(30):
        source = draining(load("decode-0", *here.values()))
        target = load("decode-1", *there.values())
        for move in balancer.decide(view(source, target, full("decode-2"), now=now)):
            if move.source == "decode-0":
                assert (move.target, move.reason) == ("decode-1", "drain")
                there[move.request_id] = here.pop(move.request_id)
            else:
                assert move.target != "decode-0"
    assert not here


def test_a_waiting_prompt_leaves_a_draining_instance_too():
    seen = view(draining(load("mixed-0", waiting("w", 10, "waiting"))), load("mixed-1"))
    assert [move.request_id for move in Balancer().decide(seen)] == ["w"]


def new(name: str, blocks: int) -> Running:
    """A prompt that waits for room."""
    return waiting(name, blocks, "waiting")


def test_a_prompt_that_finds_no_room_goes_on_to_where_nothing_waits():
    options = BalancerSettings(low_steps=0.0, high_steps=1e9, hole_steps=1e9)
    seen = view(
        load("mixed-0", *crowd("a", 9, 105), new("prompt", 60)),
        load("mixed-1", *crowd("b", 5, 105), new("other", 600)),
        load("mixed-2", *crowd("c", 8, 105)),
        load("decode-3"),
    )
    moves = Balancer(options).decide(seen)
    assert [(m.request_id, m.target, m.reason) for m in moves] == [("prompt", "mixed-2", "room")]


def test_a_prompt_that_waits_for_its_turn_or_was_begun_already_stays():
    options = BalancerSettings(low_steps=0.0, high_steps=1e9)
    begun = replace(new("begun", 60), output_tokens=3)
    for one in (new("short", 20), begun):
        seen = view(load("mixed-0", *crowd("a", 9, 105), one), load("mixed-1"))
        assert [m for m in Balancer(options).decide(seen) if m.reason == "room"] == []


def test_a_running_sequence_leaves_an_instance_that_became_a_prefill_instance():
    seen = view(load("prefill-0", running("stray", 10)), load("decode-0"))
    assert [(m.request_id, m.reason) for m in Balancer().decide(seen)] == [("stray", "role")]


def test_with_the_balancer_off_only_drains_move():
    loads = (full("decode-0"), draining(load("decode-1", running("a", 5))), load("decode-2"))
    moves = Balancer().decide(view(*loads), drain_only=True)
    assert [(m.request_id, m.reason) for m in moves] == [("a", "drain")]


def test_a_request_moves_at_most_so_often_a_minute():
    balancer = Balancer(BalancerSettings(moves_a_minute=2, patience_s=1.0))
    moments: dict[str, list[float]] = {}
    for now in range(0, 300, 2):
        at_source = load(f"decode-{now // 2 % 2}", *crowd("a", 8, 123))
        other = load(f"decode-{1 - now // 2 % 2}")
        for move in balancer.decide(view(at_source, other, now=now)):
            moments.setdefault(move.request_id, []).append(now)
    assert moments
    for times in moments.values():
        assert all(later - early >= 60.0 for early, later in zip(times, times[2:], strict=False))


def test_a_move_that_shows_no_effect_is_given_up_and_its_room_is_free_again():
    balancer = Balancer(BalancerSettings(moves_a_minute=1, patience_s=5.0))
    seen = draining(load("decode-0", running("a", 900)))
    assert balancer.decide(view(seen, load("decode-1")))
    assert not balancer.decide(view(seen, load("decode-1"), now=4.0))
    assert balancer.decide(view(seen, load("decode-1"), now=6.0))


def test_a_move_that_failed_frees_its_room_at_once():
    balancer = Balancer()
    seen = draining(load("decode-0", running("a", 900)))
    assert balancer.decide(view(seen, load("decode-1")))
    balancer.failed("a")
    assert balancer.decide(view(seen, load("decode-1"), now=0.1))


def test_a_move_must_be_worth_its_cost():
    costly = BalancerSettings(fixed_cost_s=1e6)
    assert Balancer(costly).decide(view(full("decode-0"), load("decode-1"))) == ()


sequences = st.lists(
    st.tuples(
        st.integers(1, 200),
        st.integers(-1, 2),
        st.sampled_from(("running", "running", "running", "swapped", "held", "copying")),
    ),
    max_size=12,
)
clusters = st.lists(
    st.tuples(
        st.sampled_from(("prefill", "decode", "decode", "mixed")),
        st.sampled_from((InstanceState.READY, InstanceState.READY, InstanceState.DRAINING)),
        sequences,
    ),
    max_size=6,
)


def cluster(drawn) -> list[Load]:
    loads = []
    for number, (role, state, drawn_sequences) in enumerate(drawn):
        kept: list[Running] = []
        for index, (blocks, priority, kind) in enumerate(drawn_sequences):
            if sum(one.blocks for one in kept) + blocks <= TOTAL:
                kept.append(running(f"{number}/{index}", blocks, priority, kind))
        loads.append(load(f"{role}-{number}", *kept, state=state))
    return loads


def after(loads: list[Load], moves) -> list[Load]:
    """All moves carried out at once."""
    sequences = {one.instance: list(one.sequences) for one in loads}
    for move in moves:
        one = next(s for s in sequences[move.source] if s.request_id == move.request_id)
        sequences[move.source].remove(one)
        sequences[move.target].append(one)
    return [load(one.instance, *sequences[one.instance], state=one.state) for one in loads]


@settings(deadline=None, max_examples=200)
@given(clusters, st.integers(1, 6))
def test_whatever_the_view_moves_have_room_and_keep_their_limits(drawn, rounds):
    options = BalancerSettings(low_steps=500.0, high_steps=900.0)
    balancer, loads = Balancer(options), cluster(drawn)
    for now in range(rounds):
        moves = balancer.decide(view(*loads, now=now))
        by_name = {one.instance: one for one in loads}
        per_link = Counter((m.source, m.target) for m in moves if m.reason != "drain")
        outgoing = Counter(m.source for m in moves if m.reason != "drain")
        assert all(count <= options.link_moves for count in per_link.values())
        assert all(count <= options.outgoing_moves for count in outgoing.values())
        for move in moves:
            source, target = by_name[move.source], by_name[move.target]
            assert source is not target
            assert target.state is InstanceState.READY
            assert target.role.decodes
            assert any(one.request_id == move.request_id for one in source.sequences)
        loads = after(loads, moves)
        assert all(one.free_blocks >= 0 for one in loads)
    assert len({m.request_id for m in moves}) == len(moves)


@settings(deadline=None, max_examples=100)
@given(clusters)
def test_it_comes_to_rest(drawn):
    balancer, loads = Balancer(), cluster(drawn)
    for now in range(150):
        loads = after(loads, balancer.decide(view(*loads, now=now)))
    # By now every request may move again, and none wants to.
    assert [balancer.decide(view(*loads, now=now)) for now in range(300, 310)] == [()] * 10


@pytest.mark.parametrize("instances", [3, 16])
def test_skewed_lengths_even_out(instances):
    balancer = Balancer(BalancerSettings(low_steps=400.0, high_steps=600.0))
    loads = [full("decode-0"), *(load(f"decode-{n}") for n in range(1, instances))]
    for now in range(120):
        loads = after(loads, balancer.decide(view(*loads, now=now)))
    assert min(one.free_blocks for one in loads) > 150


def test_a_prompt_that_is_being_computed_stays_where_it_is():
    computing = replace(running("r", 10), output_tokens=0)
    decoding = replace(computing, request_id="s", output_tokens=1)
    seen = view(load("prefill-0", computing, decoding), load("decode-0"))
    assert [move.request_id for move in Balancer().decide(seen)] == ["s"]
