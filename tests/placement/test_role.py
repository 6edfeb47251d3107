"""A mixed instance's batches: every decode, and as many prompt tokens as their target allows."""

from dataclasses import replace

import pytest

from decode.scheduler import DecodeSettings
from engine.blocks import BlockPool, blocks_for
from engine.request import Request, Sampling, start_sequence
from engine.slo import Slo
from placement.role import RoleBatcher, RoleSettings
from prefill.scheduler import PrefillSettings

TPOT_S = 0.04
LIMIT_S = TPOT_S * RoleSettings().tpot_share


def duration_s(step):
    """A device on which weights, decodes and prompt tokens each have their price."""
    prompt_tokens = sum(len(chunk.tokens) for chunk in step.prefills)
    return 0.010 + 0.0006 * len(step.decodes) + 0.00012 * prompt_tokens


def request(name, tokens):
    prompt = tuple(hash((name, place)) % 10_000 for place in range(tokens))
    return Request(name, prompt, Sampling(max_tokens=4096), Slo(1.0, TPOT_S))


def decode_on(batcher, number):
    sequence = start_sequence(request(f"decode {number}", 8), 1, (7,))
    sequence.blocks = batcher.decode.pool.allocate(blocks_for(4096, 16))
    sequence.computed = 8
    batcher.decode.add(sequence)


def step(batcher, now, duration_s=duration_s):
    """Runs one; prompts that are done leave, so that only decodes that were asked for run."""
    taken = batcher.next_step(now)
    for chunk in taken.decodes:
        batcher.decode.computed(chunk).tokens.append(7)
    for chunk in taken.prefills:
        batcher.prefill.computed(chunk)
        if chunk.draw is not None:
            batcher.prefill.pool.release(batcher.prefill.remove(chunk.request_id).blocks)
    batcher.measured(taken, duration_s(taken))
    return taken


def drain(batcher):
    for scheduler in (batcher.prefill, batcher.decode):
        for sequence in scheduler.sequences:
            scheduler.pool.release(scheduler.remove(sequence.id).blocks)
    assert batcher.prefill.pool.available == batcher.prefill.pool.total_blocks


@pytest.mark.parametrize("first_guess", [500.0, 10_000.0, 1e6])
def test_batches_come_to_fill_the_target_while_decodes_never_run_alone(first_guess):
    settings = RoleSettings(PrefillSettings(tokens_per_s=first_guess))
    batcher = RoleBatcher(BlockPool(20_000, 16), settings)
    for number in range(200):
        batcher.prefill.add(start_sequence(request(f"prompt {number}", 1000), 1))
    for number in range(30):
        decode_on(batcher, number)
        for _ in range(10):
            taken = step(batcher, now=0.0)
            assert taken.prefills
    assert duration_s(taken) == pytest.approx(LIMIT_S, rel=0.1)
    drain(batcher)


def test_no_prompt_takes_the_room_that_a_sequence_which_gave_way_waits_for():
    batcher = RoleBatcher(BlockPool(4, 4), RoleSettings(decode=DecodeSettings(watermark=0.0)))
    for arrival_s, name in enumerate(("old", "late")):
        wanted = replace(request(name, 7), arrival_s=float(arrival_s))
        sequence = start_sequence(wanted, 1, (7,))
        sequence.blocks = batcher.decode.pool.allocate(2)
        sequence.computed = 7
        batcher.decode.add(sequence)
    assert len(step(batcher, 0.0).decodes) == 2
    for number in range(9):
        batcher.prefill.add(start_sequence(request(f"prompt {number}", 3), 1))
    assert [chunk.request_id for chunk in step(batcher, 0.0).decodes] == ["old"]
    while "old" in batcher.decode:
        taken = step(batcher, 0.0)
        assert not taken.prefills
        if len(batcher.decode.find("old").tokens) > 10:
            batcher.decode.pool.release(batcher.decode.remove("old").blocks)
    taken = step(batcher, 0.0)
    assert [chunk.request_id for chunk in taken.decodes] == ["late"]
    assert len(taken.prefills) == 1
    drain(batcher)


def duration_with_a_jump_s(step):
    """Decodes alone take kernels of their own; prompt tokens beside them then cost little."""
    prompt_tokens = sum(len(chunk.tokens) for chunk in step.prefills)
    decodes_s = 0.0004 * len(step.decodes)
    return decodes_s + (0.016 + 0.00004 * prompt_tokens if prompt_tokens else 0.008)


def test_the_second_of_a_few_batches_with_prompts_fills_the_target_whatever_decodes_took():
    batcher = RoleBatcher(BlockPool(20_000, 16), RoleSettings())
    for number in range(100):
        batcher.prefill.add(start_sequence(request(f"prompt {number}", 1000), 1))
    second_s = []
    for number in range(6):
        decode_on(batcher, number)
        took_s = [duration_with_a_jump_s(step(batcher, 0.0, duration_with_a_jump_s)) for _ in "123"]
        second_s.append(took_s[1])
        alone = replace(batcher.next_step(0.0), prefills=())
        for _ in range(20):
            batcher.measured(alone, duration_with_a_jump_s(alone))
    assert second_s[1:] == pytest.approx([LIMIT_S] * 5, rel=0.05)
    drain(batcher)


def test_one_batch_that_was_held_up_does_not_stop_prompts():
    batcher = RoleBatcher(BlockPool(20_000, 16), RoleSettings())
    for number in range(100):
        batcher.prefill.add(start_sequence(request(f"prompt {number}", 1000), 1))
    decode_on(batcher, 0)
    for _ in range(30):
        taken = step(batcher, now=0.0)
    before = len(taken.prefills[0].tokens)
    batcher.measured(taken, 5.0)
    assert len(step(batcher, now=0.0).prefills[0].tokens) > before / 2
    drain(batcher)


def test_a_spell_of_slowness_teaches_nothing_of_what_prompts_cost():
    """Its batches shrink to their least and then quicken of themselves, at one size."""
    batcher = RoleBatcher(BlockPool(20_000, 16), RoleSettings())
    for number in range(100):
        batcher.prefill.add(start_sequence(request(f"prompt {number}", 1000), 1))
    for number in range(3):
        decode_on(batcher, number)

    def slow_by(factor):
        return lambda step: factor * (0.014 + 0.0011 * sum(len(c.tokens) for c in step.prefills))

    for _ in range(60):
        step(batcher, 0.0, slow_by(1.0))
    fitting = []
    for factor in (2.6, 1.9, 1.6, 1.5, 1.4, 1.2, 1.1, 1.3, 1.1, 1.05, 1.0, 1.0, 1.0, 1.0):
        taken = step(batcher, 0.0, slow_by(factor))
        fitting.append(slow_by(1.0)(taken))
    assert max(fitting) < 1.15 * LIMIT_S
    assert fitting[-1] > 0.8 * LIMIT_S
    drain(batcher)
