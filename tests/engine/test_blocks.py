import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.blocks import BlockCounts, BlockPool, blocks_for, prefix_hashes
from engine.errors import OutOfBlocks


def test_a_pool_gives_what_it_has_and_no_more():
    pool = BlockPool(4, 16)
    blocks = pool.allocate(3)
    with pytest.raises(OutOfBlocks, match="2 blocks wanted, 1 can be given"):
        pool.allocate(2)
    pool.release(blocks)
    assert pool.counts() == BlockCounts(4, 0, 0, 0, 0)


def test_a_released_prefix_is_found_again_and_evicted_oldest_first():
    pool = BlockPool(4, 2)
    tokens = [1, 2, 3, 4, 5]
    hashes = prefix_hashes(tokens, 2, "")
    blocks = pool.allocate(blocks_for(len(tokens), 2))
    pool.remember(blocks, hashes)
    pool.release(blocks)
    assert pool.counts() == BlockCounts(2, 0, 0, 0, 2)
    assert pool.share_prefix(hashes) == blocks[:2]
    pool.release(blocks[:2])
    pool.release(pool.allocate(3))
    assert pool.cached_prefix(hashes) == 1
    pool.check()


def test_tenants_never_see_each_others_prefixes():
    pool = BlockPool(2, 2)
    blocks = pool.allocate(1)
    pool.remember(blocks, prefix_hashes([1, 2], 2, "alice"))
    assert pool.cached_prefix(prefix_hashes([1, 2], 2, "bob")) == 0
    assert pool.cached_prefix(prefix_hashes([1, 2], 2, "alice")) == 1


def test_a_pinned_block_outlives_its_owner():
    pool = BlockPool(2, 2)
    blocks = pool.allocate(2)
    pool.pin(blocks)
    pool.release(blocks)
    assert pool.counts() == BlockCounts(0, 0, 0, 2, 0)
    pool.unpin(blocks)
    assert pool.counts().free == 2


def test_known_hashes_are_extended_not_recomputed():
    tokens = list(range(10))
    assert prefix_hashes(tokens, 2, "s", prefix_hashes(tokens[:5], 2, "s")) == prefix_hashes(
        tokens, 2, "s"
    )


class PoolMachine(RuleBasedStateMachine):
    """Any order of verbs leaves every block in exactly one state."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(12, 2)
        self.owned, self.pinned, self.reserved = [], [], []

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def start(self, prompt):
        hashes = prefix_hashes(prompt, 2, "")
        blocks = self.pool.share_prefix(hashes)
        try:
            blocks += self.pool.allocate(blocks_for(len(prompt), 2) - len(blocks))
        except OutOfBlocks:
            self.pool.release(blocks)
            return
        self.pool.remember(blocks, hashes)
        self.owned.append(blocks)

    @rule(data=st.data())
    def finish(self, data):
        if self.owned:
            self.pool.release(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @rule(data=st.data())
    def pin(self, data):
        if self.owned:
            blocks = data.draw(st.sampled_from(self.owned))
            self.pool.pin(blocks)
            self.pinned.append(blocks)

    @rule()
    def unpin(self):
        if self.pinned:
            self.pool.unpin(self.pinned.pop())

    @rule(count=st.integers(1, 4))
    def reserve(self, count):
        if count <= self.pool.available:
            self.reserved.append(self.pool.reserve(count))

    @rule(commit=st.booleans())
    def settle(self, commit):
        if self.reserved:
            blocks = self.reserved.pop()
            if commit:
                self.pool.claim(blocks)
                self.owned.append(blocks)
            else:
                self.pool.unreserve(blocks)

    @invariant()
    def every_block_has_one_state(self):
        self.pool.check()
        assert self.pool.counts().total == 12

    def teardown(self):
        for blocks in self.pinned:
            self.pool.unpin(blocks)
        for blocks in self.owned:
            self.pool.release(blocks)
        for blocks in self.reserved:
            self.pool.unreserve(blocks)
        assert self.pool.counts().available == 12


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
