"""The pool that counts gives, takes and refuses as the one whose blocks have numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BlockPool
from engine.errors import OutOfBlocks
from placement.simulation.counted_pool import CountedPool

VERBS = st.tuples(st.sampled_from(["allocate", "reserve", "claim", "unreserve", "release"]),
                  st.integers(0, 12))  # fmt: skip


def given_out(pool: BlockPool, verb: str, count: int) -> list[int] | None:
    try:
        return pool.allocate(count) if verb == "allocate" else pool.reserve(count)
    except OutOfBlocks:
        return None


def play(pool: BlockPool, verbs: list[tuple[str, int]]) -> list[tuple[int, int, int]]:
    """What is left, owned and reserved after each verb; everything is given back at the end."""
    owned: list[list[int]] = []
    reserved: list[list[int]] = []
    seen = []
    for verb, count in verbs:
        if verb in ("allocate", "reserve"):
            blocks = given_out(pool, verb, count)
            if blocks is not None:
                (owned if verb == "allocate" else reserved).append(blocks)
        elif verb == "release" and owned:
            pool.release(owned.pop(0))
        elif verb == "unreserve" and reserved:
            pool.unreserve(reserved.pop(0))
        elif verb == "claim" and reserved:
            owned.append(reserved.pop(0))
            pool.claim(owned[-1])
        pool.check()
        counts = pool.counts()
        seen.append((pool.available, counts.owned, counts.reserved))
    for blocks in owned:
        pool.release(blocks)
    for blocks in reserved:
        pool.unreserve(blocks)
    assert pool.available == pool.total_blocks
    return seen


@given(st.lists(VERBS, max_size=40))
def test_it_counts_as_the_numbered_pool_does(verbs: list[tuple[str, int]]) -> None:
    assert play(CountedPool(20, 16), verbs) == play(BlockPool(20, 16, cache_prefixes=False), verbs)


def test_it_refuses_what_it_has_not_and_gives_nothing() -> None:
    pool = CountedPool(4, 16)
    with pytest.raises(OutOfBlocks):
        pool.allocate(5)
    assert pool.available == 4
