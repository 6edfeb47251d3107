from random import Random

import pytest

from engine.blocks import BlockPool
from engine.errors import OutOfBlocks
from engine.request import Request, Sampling, start_sequence
from engine.slo import Slo
from prefill.scheduler import PrefillScheduler, PrefillSettings


def scheduler(blocks=64, **settings):
    return PrefillScheduler(BlockPool(blocks, 4), PrefillSettings(**settings))


def prompt(name, tokens, *, arrival_s=0.0, ttft_s=10.0, priority=0, first=0):
    request = Request(
        name,
        tuple(range(first, first + tokens)),
        Sampling(max_tokens=4),
        Slo(ttft_s, 0.1),
        priority=priority,
        arrival_s=arrival_s,
    )
    return start_sequence(request, epoch=1)


def sizes(chunks):
    return [(chunk.request_id, len(chunk.tokens)) for chunk in chunks]


def run(prefill, chunks):
    """Computes the chunks; finished prompts leave with their blocks freed."""
    for chunk in chunks:
        sequence = prefill.computed(chunk)
        if chunk.draw is not None:
            prefill.pool.release(prefill.remove(sequence.id).blocks)


def assert_empty(prefill):
    assert len(prefill) == 0
    assert prefill.queued_tokens == 0
    assert prefill.pool.available == prefill.pool.total_blocks


def test_ragged_prompts_share_a_batch_and_the_last_is_split_at_the_budget():
    prefill = scheduler()
    for name, tokens, first in (("a", 5, 0), ("b", 3, 100), ("c", 8, 200)):
        prefill.add(prompt(name, tokens, first=first))
    chunks = prefill.next_chunks(0.0, 10)
    assert sizes(chunks) == [("a", 5), ("b", 3), ("c", 2)]
    assert [chunk.draw is not None for chunk in chunks] == [True, True, False]
    run(prefill, chunks)
    rest = prefill.next_chunks(0.0, 10)
    assert [(c.request_id, c.start, len(c.tokens)) for c in rest] == [("c", 2, 6)]
    run(prefill, rest)
    assert_empty(prefill)


def test_prompts_without_a_place_want_blocks_and_those_with_one_do_not():
    prefill = scheduler(blocks=4)
    prefill.add(prompt("placed", 10))
    run(prefill, prefill.next_chunks(0.0, 4))
    assert prefill.wanted_blocks == 0
    prefill.add(prompt("waits", 14, first=100))
    assert prefill.wanted_blocks == 4
    while len(prefill):
        run(prefill, prefill.next_chunks(0.0, 4))
    assert prefill.wanted_blocks == 0
    assert_empty(prefill)


def test_the_earlier_deadline_goes_first_within_a_priority():
    prefill = scheduler()
    prefill.add(prompt("late", 4, ttft_s=9.0))
    prefill.add(prompt("soon", 4, ttft_s=5.0, first=50))
    prefill.add(prompt("urgent", 4, ttft_s=9.5, priority=1, first=90))
    assert [name for name, _ in sizes(prefill.next_chunks(0.0, 64))] == ["urgent", "soon", "late"]


def test_first_come_first_served_ignores_deadlines():
    prefill = scheduler(policy="fcfs")
    prefill.add(prompt("first", 4, arrival_s=0.0, ttft_s=9.0))
    prefill.add(prompt("second", 4, arrival_s=1.0, ttft_s=1.0, first=50))
    assert [name for name, _ in sizes(prefill.next_chunks(1.5, 64))] == ["first", "second"]


def test_a_huge_prompt_that_misses_its_target_leaves_the_budget_to_others_but_for_its_share():
    prefill = scheduler(blocks=256, tokens_per_s=100.0, late_share=0.25)
    prefill.add(prompt("huge", 800, ttft_s=1.0))
    for n in range(3):
        prefill.add(prompt(f"short{n}", 16, ttft_s=1.0, first=1000 + 100 * n))
    assert sizes(prefill.next_chunks(0.0, 40)) == [("huge", 10), ("short0", 16), ("short1", 14)]


def test_in_a_burst_the_longest_prompts_make_room_for_many_short_ones():
    prefill = scheduler(blocks=1024, tokens_per_s=1000.0, late_share=0.0)
    prefill.add(prompt("long", 900, ttft_s=1.0))
    for n in range(8):
        prefill.add(prompt(f"short{n}", 100, ttft_s=1.1 + n / 100, first=1000 * (n + 1)))
    order = [name for name, _ in sizes(prefill.next_chunks(0.0, 4000))]
    assert order == [*(f"short{n}" for n in range(8)), "long"]


def test_an_urgent_long_prompt_is_not_put_off_for_less_urgent_ones():
    prefill = scheduler(blocks=1024, tokens_per_s=1000.0, late_share=0.0)
    prefill.add(prompt("long", 900, ttft_s=1.0, priority=1))
    prefill.add(prompt("short", 200, ttft_s=1.0, first=2000))
    assert [name for name, _ in sizes(prefill.next_chunks(0.0, 4000))] == ["long", "short"]


def test_a_cached_prefix_is_not_computed_again_but_for_the_last_token():
    prefill = scheduler()
    prefill.add(prompt("a", 8))
    run(prefill, prefill.next_chunks(0.0, 64))
    prefill.add(prompt("b", 8))
    (chunk,) = prefill.next_chunks(0.0, 64)
    assert (chunk.start, len(chunk.tokens)) == (4, 4)
    run(prefill, [chunk])
    assert_empty(prefill)


def test_a_sibling_waits_a_batch_for_the_prefix_being_computed():
    prefill = scheduler()
    prefill.add(prompt("a", 9))
    prefill.add(prompt("b", 9))
    first = prefill.next_chunks(0.0, 64)
    assert sizes(first) == [("a", 9)]
    run(prefill, first)
    assert sizes(prefill.next_chunks(0.0, 64)) == [("b", 1)]


def test_a_prompt_without_room_keeps_those_behind_it_out_while_admitted_ones_go_on():
    prefill = scheduler(blocks=4)
    prefill.add(prompt("admitted", 12, ttft_s=9.0))
    run(prefill, prefill.next_chunks(0.0, 6))
    prefill.add(prompt("large", 15, ttft_s=5.0, first=50))
    prefill.add(prompt("small", 2, ttft_s=6.0, first=90))
    assert sizes(prefill.next_chunks(0.0, 64)) == [("admitted", 6)]


def test_a_prompt_larger_than_the_pool_is_refused():
    prefill = scheduler(blocks=2)
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 can be given"):
        prefill.add(prompt("a", 8))
    assert_empty(prefill)


def test_the_rate_is_learnt_from_batches():
    prefill = scheduler(tokens_per_s=100.0)
    for _ in range(60):
        prefill.measured(1000, 1.0)
    assert prefill.tokens_per_s == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_where_no_prompt_may_go_on_there_is_no_chunk(seed):
    rng = Random(seed)
    prefill, met = scheduler(blocks=8), set()
    for number in range(60):
        if rng.random() < 0.5:
            tokens, first = rng.randint(1, 24), rng.choice((0, 0, 100 * number))
            prefill.add(prompt(f"p{number}", tokens, first=first, arrival_s=float(number)))
        pinned = prefill.pool.allocate(rng.randint(0, prefill.pool.available))
        may_go_on = prefill.may_go_on
        chunks = prefill.next_chunks(float(number), 16)
        assert may_go_on or not chunks
        met.add((may_go_on, bool(chunks)))
        run(prefill, chunks)
        prefill.pool.release(pinned)
    assert {(True, True), (False, False)} <= met
    while len(prefill):
        run(prefill, prefill.next_chunks(1e6, 64))
    assert_empty(prefill)
