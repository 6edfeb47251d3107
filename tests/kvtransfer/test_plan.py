"""Every (layer, head, token) of the target is written once, from the right place."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import LayoutMismatch
from engine.layout import DTYPE_BYTES, KvLayout
from kvtransfer.plan import Copies, plan_rank, plan_transfer

POOL_BLOCKS = 9
CUTS = [(tensor, stages) for tensor in range(1, 9) for stages in range(1, 5)]


def layout(tensor=1, stages=1, *, heads=8, layers=5, block_tokens=4):
    return KvLayout("toy", layers, heads, 2, block_tokens, "float16", tensor, stages)


def fits(cut, heads):
    tensor, _ = cut
    return heads % tensor == 0 if heads >= tensor else True


@cache
def pools(shape, blocks, tokens):
    """Each rank's pool, holding at each slot a number that says what belongs there, else 0."""
    made = []
    for rank in range(shape.ranks):
        pool = np.zeros(POOL_BLOCKS * shape.block_bytes(rank) // 2, np.uint16)
        filled = 0
        for where, what in slots(shape, rank, blocks, tokens):
            pool[where] = what
            filled += shape.head_dim
        assert np.count_nonzero(pool) == filled, "two slots share a place"
        made.append(pool)
    return made


def slots(shape, rank, blocks, tokens):
    """(slice of the pool, its contents) for every layer, head and token of a rank."""
    width = DTYPE_BYTES[shape.dtype]
    for layer in shape.stage_layers(shape.stage_of_rank(rank)):
        for head in shape.rank_heads(rank):
            for value in (False, True):
                for token in tokens:
                    block = blocks[token // shape.block_tokens]
                    start = shape.offset(rank, block, layer, value=value, head=head) // width
                    start += token % shape.block_tokens * shape.head_dim
                    mark = ((layer * shape.kv_heads + head) * 2 + value) * 64 + token + 1
                    yield slice(start, start + shape.head_dim), mark


def carry_out(plan, source_pools, target):
    """Applies a plan, counting how often each target byte is written."""
    width = 2
    written = [np.zeros(POOL_BLOCKS * target.block_bytes(r) // 2, int) for r in range(target.ranks)]
    result = [np.zeros_like(count, np.uint16) for count in written]
    for pull in plan.pulls:
        copies = pull.copies
        for s, t, n in zip(
            copies.source_offsets // width,
            copies.target_offsets // width,
            copies.nbytes // width,
            strict=True,
        ):
            piece = source_pools[pull.source_rank][s : s + n]
            assert len(piece) == n, "a copy reads past the source's pool"
            result[pull.target_rank][t : t + n] = piece
            written[pull.target_rank][t : t + n] += 1
    return result, written


def assert_moves(source, target, source_blocks, target_blocks, tokens):
    every = range(len(source_blocks) * source.block_tokens)
    before = pools(source, tuple(source_blocks), every)
    after = pools(target, tuple(target_blocks), tokens)
    plan = plan_transfer(source, target, source_blocks, target_blocks, tokens=tokens)
    result, written = carry_out(plan, before, target)
    for count, got, wanted in zip(written, result, after, strict=True):
        here = wanted > 0
        assert count.max(initial=0) <= 1
        assert (count[here] == 1).all()
        assert (got[here] == wanted[here]).all()
        if source.block_tokens != target.block_tokens:
            assert count.sum() == here.sum()


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("source_cut", CUTS, ids=lambda cut: f"{cut[0]}x{cut[1]}")
def test_every_pair_of_layouts_writes_each_slot_once_from_the_right_place(source_cut, heads):
    targets = [cut for cut in CUTS if fits(cut, heads)]
    if not fits(source_cut, heads):
        with pytest.raises(LayoutMismatch, match="tensor_parallel: source"):
            plan_transfer(layout(*source_cut, heads=heads), layout(heads=heads), [0], [1])
        return
    for target_cut in targets:
        source = layout(*source_cut, heads=heads, block_tokens=2)
        target = layout(*target_cut, heads=heads, block_tokens=2)
        assert_moves(source, target, [3, 4], [7, 8], range(4))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_blocks_tokens_and_block_sizes(data):
    heads = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    cuts = st.sampled_from([cut for cut in CUTS if fits(cut, heads)])
    sizes = st.sampled_from([1, 2, 3, 4])
    source, target = (
        layout(*data.draw(cuts), heads=heads, layers=data.draw(st.just(5)), block_tokens=size)
        for size in data.draw(st.tuples(sizes, sizes))
    )
    stop = data.draw(st.integers(1, 2 * min(source.block_tokens, target.block_tokens) + 1))
    tokens = range(data.draw(st.integers(0, stop - 1)), stop)
    tables = [
        data.draw(st.permutations(range(POOL_BLOCKS)))[: -(-stop // shape.block_tokens)]
        for shape in (source, target)
    ]
    assert_moves(source, target, *tables, tokens)


def test_layer_groups_together_make_the_whole():
    source, target = layout(2, 2), layout(4, 1)
    groups = [
        plan_transfer(source, target, [1, 2], [5, 3], layers=run)
        for run in (range(2), range(2, 3), range(3, 5))
    ]
    whole = plan_transfer(source, target, [1, 2], [5, 3])
    assert sum(plan.total_bytes for plan in groups) == whole.total_bytes


def test_equal_layouts_copy_runs_of_blocks_in_one_piece():
    plan = plan_transfer(layout(2, 2), layout(2, 2), [2, 3, 4, 7], [1, 2, 3, 5])
    assert [(pull.source_rank, pull.target_rank) for pull in plan.pulls] == [
        (rank, rank) for rank in range(4)
    ]
    block_bytes = layout(2, 2).block_bytes(0)
    assert plan.pulls[0].copies.nbytes.tolist() == [3 * block_bytes, block_bytes]


def test_replicated_heads_are_read_evenly_from_all_who_hold_them():
    plan = plan_transfer(layout(8, heads=2), layout(1, heads=2), range(8), range(8))
    assert {pull.copies.total_bytes for pull in plan.pulls} == {plan.total_bytes // 8}


def test_replicas_pair_off_when_both_sides_have_as_many():
    plan = plan_transfer(layout(8, heads=2), layout(8, heads=2), range(4), range(4))
    assert [(pull.source_rank, pull.target_rank) for pull in plan.pulls] == [
        (rank, rank) for rank in range(8)
    ]


def test_a_rank_plans_its_own_part_alone():
    source, target = layout(2, 2), layout(4, 1)
    for rank in range(target.ranks):
        alone = plan_rank(source, target, [0, 1], [2, 3], rank)
        whole = plan_transfer(source, target, [0, 1], [2, 3]).of_target(rank)
        assert [pull.source_rank for pull in alone] == [pull.source_rank for pull in whole]
        for mine, same in zip(alone, whole, strict=True):
            assert mine.copies.target_offsets.tolist() == same.copies.target_offsets.tolist()


def test_both_sides_see_the_same_pulls():
    plan = plan_transfer(layout(2, 2), layout(4, 1), [0], [1])
    from_sources = [pull for rank in range(4) for pull in plan.of_source(rank)]
    assert len(from_sources) == len(plan.pulls)


def test_no_tokens_means_no_copies():
    assert plan_transfer(layout(4, heads=2), layout(heads=2), [], []).pulls == ()
    assert plan_transfer(layout(), layout(2), [1], [2], tokens=range(2, 2)).pulls == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", "other"), ("layers", 6), ("kv_heads", 4), ("head_dim", 4), ("dtype", "float32")],
)
def test_layouts_of_different_models_are_refused_by_name(field, value):
    with pytest.raises(LayoutMismatch, match=f"^{field}: source .*, target {value!r}"):
        plan_transfer(layout(), replace(layout(), **{field: value}), [0], [0])


def test_the_empty_end_of_a_larger_last_block_needs_no_room():
    source, target = layout(block_tokens=4), layout(block_tokens=2)
    plan = plan_transfer(source, target, [0, 1], [0, 1, 2])
    assert plan.total_bytes == 3 * target.block_bytes(0)
    with pytest.raises(LayoutMismatch, match="ends before token 8"):
        plan_transfer(source, target, [0, 1], [0, 1])


def test_a_table_that_ends_too_early_is_refused():
    with pytest.raises(LayoutMismatch, match="target table of 1 blocks"):
        plan_transfer(layout(), layout(), [0, 1], [0])


@given(
    sizes=st.lists(st.integers(1, 50), max_size=20),
    slice_bytes=st.integers(1, 60),
)
def test_slices_cover_the_copies_in_order_and_are_bounded(sizes, slice_bytes):
    nbytes = np.array(sizes, np.int64)
    starts = np.cumsum(nbytes) - nbytes
    copies = Copies(starts, starts + 1000, nbytes)
    slices = list(copies.slices(slice_bytes))
    moved = [
        offset
        for part in slices
        for start, count in zip(part.source_offsets, part.nbytes, strict=True)
        for offset in range(start, start + count)
    ]
    assert moved == list(range(copies.total_bytes))
    for part in slices:
        assert part.total_bytes < 2 * slice_bytes
        assert (part.target_offsets == part.source_offsets + 1000).all()
