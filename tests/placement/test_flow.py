"""A flow knows what its members need without walking them, and hands them back as if it had."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BlockPool, blocks_for
from engine.request import Request, Sampling, Sequence, start_sequence
from placement.simulation.flow import Flow

SIZE = 4
MEMBERS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=6
)
"""Prompt tokens, output tokens, and blocks in reserve."""


def member(pool: BlockPool, name: str, prompt: int, output: int, reserve: int = 0) -> Sequence:
    request = Request(name, (0,) * prompt, Sampling(max_tokens=output + 1))
    sequence = start_sequence(request, 0, (0,))
    sequence.computed = prompt
    sequence.blocks = pool.allocate(blocks_for(prompt + 1, SIZE) + reserve)
    return sequence


def flowing(pool: BlockPool, members: list[tuple[int, int, int]]) -> tuple[Flow, list[Sequence]]:
    flow = Flow(pool)
    sequences = [member(pool, str(n), *lengths) for n, lengths in enumerate(members)]
    for sequence in sequences:
        flow.add(sequence)
    return flow, sequences


def needed(sequences: list[Sequence], steps: int) -> int:
    """Blocks for the next token of each after so many steps, beyond the one it is filling."""
    lengths = [len(one.tokens) for one in sequences]
    return sum(blocks_for(n + steps, SIZE) - blocks_for(n, SIZE) for n in lengths)


@given(members=MEMBERS, steps=st.integers(0, 30))
def test_it_knows_what_its_members_will_need(
    members: list[tuple[int, int, int]], steps: int
) -> None:
    flow, sequences = flowing(BlockPool(200, SIZE), members)
    assert flow.ungrown_blocks_after(steps) == needed(sequences, steps)


@given(members=MEMBERS, spare=st.integers(0, 12))
def test_it_lasts_as_long_as_the_pool_does(members: list[tuple[int, int, int]], spare: int) -> None:
    pool = BlockPool(200, SIZE)
    flow, sequences = flowing(pool, members)
    pool.allocate(pool.available - spare)
    lasting = flow.steps_in_memory(50)
    assert needed(sequences, lasting - 1) <= spare
    assert lasting == 50 or needed(sequences, lasting) > spare


@given(members=MEMBERS, strides=st.lists(st.integers(1, 7), max_size=8))
def test_all_get_their_tokens_and_those_who_go_on_their_blocks(
    members: list[tuple[int, int, int]], strides: list[int]
) -> None:
    pool = BlockPool(200, SIZE)
    flow, sequences = flowing(pool, members)
    left: list[Sequence] = []
    for stride in strides:
        if len(flow):
            left += flow.advance(min(stride, flow.steps_to_end))
            assert flow.grow()
    flow.release()
    for one in left:
        assert one.output_tokens == one.request.sampling.max_tokens
    for one in sequences:
        assert one.computed == len(one.tokens) - 1
        assert one in left or len(one.blocks) >= blocks_for(len(one.tokens), SIZE)
        pool.release(one.blocks)
    assert (len(flow), flow.kv_read_tokens, flow.ungrown_blocks) == (0, 0, 0)
    pool.check()
    assert pool.available == pool.total_blocks


def test_it_takes_nothing_from_a_pool_that_has_too_little() -> None:
    pool = BlockPool(6, SIZE)
    flow, sequences = flowing(pool, [(3, 20, 0), (3, 20, 0)])
    assert flow.advance(8) == []
    pool.allocate(1)
    assert flow.ungrown_blocks == 4
    assert not flow.grow()
    assert pool.available == 3
    gone = flow.remove("0")
    assert len(gone.tokens) == 12
    assert flow.ungrown_blocks == 2
    assert flow.grow()
    flow.catch_up("1")
    assert len(sequences[1].blocks) == 3
    flow.release()
    assert pool.available == 1
