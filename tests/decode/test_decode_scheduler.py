from decode.scheduler import DecodeScheduler, DecodeSettings
from engine.batch import UNREAD
from engine.blocks import BlockPool, blocks_for
from engine.request import Request, Sampling, SequenceState, start_sequence


def scheduler(blocks=8, **settings):
    return DecodeScheduler(BlockPool(blocks, 4), DecodeSettings(watermark=0.0, **settings))


def arrive(decode, name, tokens, *, arrival_s=0.0, priority=0):
    """A sequence whose prompt is computed and whose first token is drawn."""
    prompt = tuple(hash((name, n)) % 1000 for n in range(tokens))
    request = Request(name, prompt, Sampling(), priority=priority, arrival_s=arrival_s)
    sequence = start_sequence(request, 1, (7,))
    sequence.blocks = decode.pool.allocate(blocks_for(tokens, 4))
    sequence.computed = tokens
    decode.add(sequence)
    return sequence


def step(decode, held=()):
    """Runs a step; every chunk that reaches its sequence's end draws a token."""
    taken = decode.next_step(held)
    for chunk in taken.chunks:
        sequence = decode.computed(chunk)
        if chunk.draw is not None:
            sequence.tokens.append(7)
    decode.pool.check()
    return taken


def names(taken):
    return [chunk.request_id for chunk in taken.chunks]


def drain(decode):
    for sequence in decode.sequences:
        decode.pool.release(decode.remove(sequence.id).blocks)
    assert len(decode) == 0
    assert decode.pool.available == decode.pool.total_blocks
    assert decode.free_host_slots == decode.settings.host_slots


def test_every_running_sequence_takes_one_token_a_step():
    decode = scheduler()
    arrive(decode, "a", 4)
    arrive(decode, "b", 6)
    assert [(c.request_id, len(c.tokens)) for c in step(decode).chunks] == [("a", 1), ("b", 1)]
    drain(decode)


def test_a_held_sequence_keeps_its_place_without_taking_a_token():
    decode = scheduler()
    arrive(decode, "a", 4)
    arrive(decode, "b", 4)
    step(decode)
    assert names(step(decode, held={"a"})) == ["b"]
    assert names(step(decode)) == ["a", "b"]
    drain(decode)


def test_no_more_run_at_once_than_there_are_places():
    decode = scheduler(max_sequences=1)
    arrive(decode, "a", 4, arrival_s=0.0)
    arrive(decode, "b", 4, arrival_s=1.0)
    assert names(step(decode)) == ["a"]
    decode.pool.release(decode.remove("a").blocks)
    assert names(step(decode)) == ["b"]
    drain(decode)


def test_the_latest_of_the_lowest_priority_gives_way_and_is_recomputed_before_newcomers():
    decode = scheduler(blocks=4)
    old = arrive(decode, "old", 7, arrival_s=0.0)
    late = arrive(decode, "late", 7, arrival_s=1.0)
    step(decode)
    taken = step(decode)
    assert taken.preempted == ["late"]
    assert names(taken) == ["old"]
    assert (late.state, late.computed, late.blocks) == (SequenceState.WAITING, 0, [])
    assert not decode.has_room(1)
    decode.pool.release(decode.remove(old.id).blocks)
    (chunk,) = step(decode).chunks
    assert (chunk.request_id, len(chunk.tokens)) == ("late", 9)
    assert decode.has_room(1)
    drain(decode)


def test_what_gave_way_wants_all_its_blocks_back_wherever_they_went():
    for host_slots in (0, 8):
        decode = scheduler(blocks=4, host_slots=host_slots, swap_block_s=0.0)
        arrive(decode, "old", 7, arrival_s=0.0)
        arrive(decode, "late", 7, arrival_s=1.0)
        assert decode.wanted_blocks == 0
        while not decode.preemptions:
            step(decode)
        assert decode.wanted_blocks == blocks_for(len(decode.find("late").tokens), 4) > 2
        drain(decode)
        assert decode.wanted_blocks == 0


def test_priority_protects_a_later_arrival():
    decode = scheduler(blocks=4)
    arrive(decode, "plain", 7, arrival_s=0.0)
    arrive(decode, "urgent", 7, arrival_s=1.0, priority=1)
    step(decode)
    assert step(decode).preempted == ["plain"]
    drain(decode)


def test_swapping_is_chosen_when_it_costs_less_and_brings_the_same_tokens_back():
    decode = scheduler(blocks=4, host_slots=4, swap_block_s=1e-6, recompute_token_s=1.0)
    old = arrive(decode, "old", 7, arrival_s=0.0)
    late = arrive(decode, "late", 7, arrival_s=1.0)
    step(decode)
    out = step(decode)
    assert [(swap.request_id, swap.to_host) for swap in out.swaps] == [("late", True)]
    assert late.state is SequenceState.SWAPPED
    decode.pool.release(decode.remove(old.id).blocks)
    back = step(decode)
    (swap,) = back.swaps
    assert (swap.to_host, swap.host_slots) == (False, out.swaps[0].host_slots)
    assert names(back) == ["late"]
    drain(decode)


def test_neighbouring_blocks_are_swapped_to_neighbouring_slots_again_and_again():
    decode = scheduler(blocks=6, host_slots=4, swap_block_s=1e-6, recompute_token_s=1.0)
    for number in range(3):
        old = arrive(decode, f"old-{number}", 11, arrival_s=0.0)
        arrive(decode, "late", 11, arrival_s=1.0)
        step(decode)
        (out,) = step(decode).swaps
        assert out.host_slots == (0, 1, 2)
        decode.pool.release(decode.remove(old.id).blocks)
        step(decode)
        decode.pool.release(decode.remove("late").blocks)
    drain(decode)


def test_room_that_a_newcomer_brought_to_grow_is_not_swapped():
    decode = scheduler(blocks=6, host_slots=4, swap_block_s=1e-6, recompute_token_s=1.0)
    old = arrive(decode, "old", 11, arrival_s=0.0)
    late = arrive(decode, "late", 7, arrival_s=1.0)
    late.blocks.extend(decode.pool.allocate(1))
    step(decode)
    (out,) = step(decode).swaps
    assert (out.request_id, len(out.blocks), len(out.host_slots)) == ("late", 2, 2)
    decode.pool.release(decode.remove(old.id).blocks)
    (back,) = step(decode).swaps
    assert (len(back.blocks), back.host_slots) == (2, out.host_slots)
    drain(decode)


def test_a_sequence_that_outgrows_the_whole_pool_is_reported():
    decode = scheduler(blocks=2)
    sequence = arrive(decode, "a", 8)
    taken = step(decode)
    assert taken.outgrown == [sequence]
    assert taken.chunks == []
    decode.pool.release(sequence.blocks)
    drain(decode)


def test_newcomers_that_hold_all_blocks_and_lack_one_each_do_not_wait_for_each_other():
    decode = scheduler(blocks=4)
    arrive(decode, "a", 8, arrival_s=0.0)
    arrive(decode, "b", 8, arrival_s=1.0)
    assert names(step(decode)) == ["a"]
    drain(decode)


def crowded(newcomer_arrival_s):
    """A newcomer that holds all it needs, as `young` has to give way to `a`."""
    decode = scheduler(blocks=6, max_sequences=2)
    arrive(decode, "a", 7)
    arrive(decode, "young", 7, arrival_s=2.0)
    assert names(step(decode)) == ["a", "young"]
    arrive(decode, "newcomer", 7, arrival_s=newcomer_arrival_s)
    return decode


def test_a_senior_newcomer_does_not_keep_its_blocks_idle_behind_those_that_gave_way():
    decode = crowded(newcomer_arrival_s=1.0)
    taken = step(decode)
    assert taken.preempted == ["young"]
    assert names(taken) == ["a", "newcomer"]
    drain(decode)


def test_a_junior_newcomer_does_not_keep_its_blocks_idle_while_what_gave_way_finds_no_room():
    decode = crowded(newcomer_arrival_s=3.0)
    assert names(step(decode)) == ["a", "newcomer"]
    drain(decode)


def test_a_newcomer_that_lacks_a_block_waits_for_those_that_gave_way():
    decode = scheduler(blocks=7)
    arrive(decode, "a", 7)
    arrive(decode, "young", 11, arrival_s=2.0)
    assert names(step(decode)) == ["a", "young"]
    arrive(decode, "newcomer", 8, arrival_s=3.0)
    taken = step(decode)
    assert taken.preempted == ["young"]
    assert names(taken) == ["a"]
    drain(decode)


def test_the_watermark_leaves_room_to_grow():
    decode = DecodeScheduler(BlockPool(10, 4), DecodeSettings(watermark=0.2))
    assert decode.has_room(10)
    arrive(decode, "a", 4)
    assert decode.has_room(7)
    assert not decode.has_room(8)
    drain(decode)


def ahead(decode, before):
    """What follows a step that is under way, by the tokens that its chunks begin with."""
    return [(c.request_id, c.tokens[0]) for c in decode.step_ahead(names(before)).chunks]


def test_a_step_ahead_begins_with_unread_tokens_and_lets_newcomers_in():
    decode = scheduler()
    arrive(decode, "a", 7)
    before = decode.next_step()
    arrive(decode, "newcomer", 4)
    assert ahead(decode, before) == [("a", UNREAD), ("newcomer", 7)]
    assert len(decode.find("a").blocks) == blocks_for(7 + 2, 4)
    drain(decode)


def test_a_step_ahead_has_nobody_in_it_while_memory_is_short_and_takes_none():
    decode = scheduler(blocks=3)
    arrive(decode, "a", 7)
    arrive(decode, "b", 3)
    before = decode.next_step()
    assert ahead(decode, before) == []
    assert decode.pool.available == 0
    decode.pool.release(decode.remove("b").blocks)
    assert ahead(decode, before) == [("a", UNREAD)]
    drain(decode)


def test_nobody_runs_ahead_of_one_that_gave_way():
    decode = scheduler(blocks=4)
    arrive(decode, "old", 7, arrival_s=0.0)
    arrive(decode, "late", 7, arrival_s=1.0)
    step(decode)
    assert step(decode).preempted == ["late"]
    before = decode.next_step()
    assert names(before) == ["old"]
    assert ahead(decode, before) == []
    drain(decode)
