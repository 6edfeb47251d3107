"""Batches that are known, and launched, before the tokens of the one before them are."""

import asyncio
import threading

import pytest

from cluster.instance.instance import Instance, InstanceSettings
from cluster.links import LocalNetwork
from decode.scheduler import DecodeSettings
from engine.batch import UNREAD, Drawn, StepResult
from engine.blocks import BlockPool, blocks_for
from engine.errors import BadLogits, InstanceLost
from engine.messages import Abort, Dropped, Migrate, Offer, Reserved, Role, Sealed, Start
from engine.request import Request, Sampling, start_sequence
from kvtransfer.transfer import TransferSettings
from placement.role import RoleSettings
from tests.cluster.serving import PATIENCE_S, until
from tests.cluster.test_host import CountingExecutor, hosted, is_empty, run_broken, tokens_of
from tests.cluster.test_instance import LAYOUT

EOS, BLOCKS = 99, 32


def prompt_of(name: str) -> tuple[int, ...]:
    return tuple(range(ord(name[0]), ord(name[0]) + 5))


def start(one: Instance, *names: str, prompt=(), tokens: int = 9, **sampling) -> None:
    for name in names:
        request = Request(name, prompt or prompt_of(name), Sampling(max_tokens=tokens, **sampling))
        one.receive("gateway-0", Start(request, 1), 0.0)


def drawn_from(batch, tokens: dict[str, int] | None = None) -> StepResult:
    """The position that each next token stands at, if nothing else is said."""
    told = tokens or {}
    return StepResult(
        tuple(Drawn(c.request_id, told.get(c.request_id, c.end)) for c in batch.chunks if c.draw)
    )


def finish(one: Instance, batch, tokens: dict[str, int] | None = None) -> None:
    one.finish(batch, drawn_from(batch, tokens), 0.0)
    one.pool.check()


def decoding(*names: str, blocks: int = BLOCKS, **more) -> Instance:
    """An instance whose sequences have two tokens each; nothing is under way."""
    role = RoleSettings(decode=DecodeSettings(watermark=0.0))
    settings = InstanceSettings(role, TransferSettings(max_rounds=0))
    pool, eos = BlockPool(blocks, LAYOUT.block_tokens), frozenset((EOS,))
    one = Instance("mixed-0", Role.MIXED, pool, LAYOUT, settings=settings, eos=eos)
    start(one, *names, **more)
    for _ in range(2):
        finish(one, one.next_batch(0.0))
    return one


def described(batch) -> list[tuple[str, int, int]]:
    return [(c.request_id, c.tokens[0], c.start) for c in batch.chunks]


def told(one: Instance) -> dict[str, list[int]]:
    """The tokens that went out, by request."""
    found: dict[str, list[int]] = {}
    for envelope in one.take_outbox():
        for token in getattr(envelope.message, "tokens", ()):
            found.setdefault(token.request_id, []).append(token.token)
    return found


def run_out(one: Instance) -> None:
    """Until nothing is left, always a batch ahead where there is one."""
    behind = None
    while (batch := behind or one.next_batch(0.0)) is not None:
        behind = one.next_ahead(0.0)
        finish(one, batch)
    assert not one.load().sequences
    assert one.pool.available == one.pool.total_blocks


def test_the_next_batch_goes_on_with_tokens_that_nobody_has_read():
    one = decoding("a", "b")
    first = one.next_batch(0.0)
    behind = one.next_ahead(0.0)
    assert described(first) == [("a", 6, 6), ("b", 6, 6)]
    assert described(behind) == [("a", UNREAD, 7), ("b", UNREAD, 7)]
    assert [chunk.draw.position for chunk in behind.chunks] == [3, 3]
    assert all(len(chunk.blocks) >= blocks_for(chunk.end, 4) for chunk in behind.chunks)
    assert one.next_ahead(0.0) is None
    finish(one, first)
    third = one.next_ahead(0.0)
    assert described(third) == [("a", UNREAD, 8), ("b", UNREAD, 8)]
    assert {sequence.computed for sequence in one._decode.running} == {7}
    finish(one, behind)
    finish(one, third)
    run_out(one)
    assert told(one) == {name: list(range(5, 14)) for name in "ab"}


def test_who_reaches_its_last_token_is_not_in_the_batch_after_it():
    one = decoding("a", tokens=4)
    start(one, "b", tokens=9)
    finish(one, one.next_batch(0.0))
    last = one.next_batch(0.0)
    behind = one.next_ahead(0.0)
    assert [chunk.request_id for chunk in last.chunks] == ["a", "b"]
    assert described(behind) == [("b", UNREAD, 6)]
    finish(one, last)
    finish(one, behind)
    run_out(one)


def test_a_token_that_ends_the_answer_costs_no_more_than_a_draw_that_nobody_hears_of():
    one = decoding("a", "b")
    first = one.next_batch(0.0)
    behind = one.next_ahead(0.0)
    finish(one, first, {"a": EOS})
    assert [running.request_id for running in one.load().sequences] == ["b"]
    held = BLOCKS - one.pool.available
    third = one.next_ahead(0.0)
    assert described(third) == [("b", UNREAD, 8)]
    finish(one, behind, {"a": 77})
    assert BLOCKS - one.pool.available < held
    finish(one, third)
    run_out(one)
    tokens = told(one)
    assert tokens == {"a": [5, 6, EOS], "b": list(range(5, 14))}


def test_what_such_an_answer_has_computed_is_found_by_the_next_turn():
    one = decoding("a")
    first, behind = one.next_batch(0.0), one.next_ahead(0.0)
    finish(one, first, {"a": EOS})
    finish(one, behind)
    start(one, "next", prompt=(*prompt_of("a"), 5, 6, EOS, 8, 9))
    (chunk,) = one.next_batch(0.0).chunks
    assert chunk.start == 4


def test_an_aborted_request_keeps_its_blocks_until_both_batches_are_over():
    one = decoding("a", "b")
    first, behind = one.next_batch(0.0), one.next_ahead(0.0)
    one.receive("gateway-0", Abort("a", 1), 0.0)
    held = BLOCKS - one.pool.available
    finish(one, first)
    assert BLOCKS - one.pool.available == held
    finish(one, behind)
    assert BLOCKS - one.pool.available < held
    run_out(one)
    assert told(one)["a"] == [5, 6]


def test_one_who_comes_again_under_the_id_of_one_that_ended_waits_for_both_batches():
    one = decoding("a", "b")
    first, behind = one.next_batch(0.0), one.next_ahead(0.0)
    one.receive("gateway-0", Abort("a", 1), 0.0)
    again = Request("a", prompt_of("a"), Sampling(max_tokens=3))
    one.receive("gateway-1", Start(again, 2), 0.0)
    finish(one, first)
    assert one.next_ahead(0.0) is None
    finish(one, behind)
    run_out(one)


def test_a_sequence_that_arrives_while_a_batch_runs_is_in_the_one_behind_it():
    one = decoding("a")
    first = one.next_batch(0.0)
    newcomer = arrive(one, "b")
    behind = one.next_ahead(0.0)
    assert described(behind) == [("a", UNREAD, 7), ("b", newcomer.tokens[-1], 5)]
    finish(one, first)
    finish(one, behind)
    run_out(one)


def arrive(one: Instance, name: str):
    """A sequence with its KV, as a transfer brings it."""
    sequence = start_sequence(Request(name, prompt_of(name), Sampling(max_tokens=9)), 2, (55,))
    sequence.blocks, sequence.computed = one.pool.allocate(2), len(sequence.tokens) - 1
    one._residents.enter(name, "gateway-0")
    one._decode.add(sequence)
    return sequence


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_p": 0.5},
        {"logprobs": 0},
        {"repetition_penalty": 1.5},
        {"logit_bias": ((3, 1.0),)},
        {"min_tokens": 8},
    ],
    ids=str,
)
def test_nobody_runs_ahead_of_a_draw_that_is_the_hosts(sampling):
    one = decoding("a", **sampling)
    batch = one.next_batch(0.0)
    assert not one.may_be_followed
    assert one.next_ahead(0.0) is None
    finish(one, batch)
    run_out(one)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0, "top_p": 0.5}, {"min_tokens": 2}])
def test_what_only_looks_like_more_than_a_temperature_is_run_ahead_of(sampling):
    one = decoding("a", **sampling)
    batch = one.next_batch(0.0)
    assert one.may_be_followed
    behind = one.next_ahead(0.0)
    assert behind is not None
    finish(one, batch)
    finish(one, behind)
    run_out(one)


def test_a_prompt_that_could_be_computed_is_not_made_to_wait():
    one = decoding("a")
    batch, behind = one.next_batch(0.0), one.next_ahead(0.0)
    start(one, "b")
    finish(one, batch)
    assert one.next_ahead(0.0) is None
    finish(one, behind)
    assert "b" in {chunk.request_id for chunk in one.next_batch(0.0).chunks}


def test_a_prompt_for_which_there_is_no_room_does_not_hold_the_others_up():
    one = decoding("a", blocks=5, tokens=12)
    start(one, "long", prompt=tuple(range(20, 36)), tokens=1)
    batch = one.next_batch(0.0)
    behind = one.next_ahead(0.0)
    assert described(behind) == [("a", UNREAD, 7)]
    finish(one, batch)
    finish(one, behind)
    run_out(one)


def test_nobody_gives_way_for_a_batch_ahead():
    one = decoding("a", "b", blocks=4, tokens=8, ignore_eos=True)
    batch = one.next_batch(0.0)
    while (behind := one.next_ahead(0.0)) is not None:
        finish(one, batch)
        batch = behind
    assert one.preemptions == 0
    assert one.pool.available == 0
    finish(one, batch)
    run_out(one)
    assert one.preemptions == 1
    assert {name: len(tokens) for name, tokens in told(one).items()} == {"a": 8, "b": 8}


def test_a_migration_that_is_asked_for_is_sealed_once_both_batches_are_over():
    one = decoding("a", "b", tokens=30)
    batch, behind = one.next_batch(0.0), one.next_ahead(0.0)
    one.receive("controller", Migrate("a", "decode-1", "balance"), 0.0)
    finish(one, batch)
    assert one.next_ahead(0.0) is None
    finish(one, behind)
    (offer,) = [e.message for e in one.take_outbox() if isinstance(e.message, Offer)]
    batch = one.next_batch(0.0)
    one.receive("decode-1", Reserved(offer.transfer), 0.0)
    assert one.next_ahead(0.0) is None
    assert not [e for e in one.take_outbox() if isinstance(e.message, Sealed)]
    finish(one, batch)
    (sealed,) = [e.message for e in one.take_outbox() if isinstance(e.message, Sealed)]
    assert sealed.computed == batch.chunks[0].end
    batch = one.next_batch(0.0)
    assert [chunk.request_id for chunk in batch.chunks] == ["b"]
    assert one.next_ahead(0.0) is None


def test_a_batch_that_could_not_be_launched_leaves_everyone_where_they_were():
    one = decoding("a", "b")
    batch, behind = one.next_batch(0.0), one.next_ahead(0.0)
    finish(one, batch, {"a": EOS})
    one.discard(behind)
    one.pool.check()
    again = one.next_batch(0.0)
    assert described(again) == [("b", 7, 7)]
    finish(one, again)
    run_out(one)


def test_after_a_failure_the_batch_behind_is_forgotten_and_the_parts_are_tried():
    one = decoding("a", "bad")
    batch, behind = one.next_batch(0.0), one.next_ahead(0.0)
    one.discard(behind)
    one.fail_batch(batch, BadLogits("not finite"), 0.0)
    (chunk,) = (part := one.next_batch(0.0)).chunks
    assert (chunk.request_id, chunk.tokens, chunk.start) == ("a", (6,), 6)
    assert one.next_ahead(0.0) is None
    finish(one, part)
    part = one.next_batch(0.0)
    one.take_outbox()
    one.fail_batch(part, BadLogits("not finite"), 0.0)
    (dropped,) = [envelope.message for envelope in one.take_outbox()]
    assert (dropped.request_id, dropped.error) == ("bad", "BatchFailed")
    run_out(one)


class Ahead(CountingExecutor):
    """Draws on its own what it is not told, and notes what it was asked for, in order."""

    def __init__(self, *, declines=(), breaks=(), fails=()):
        self.asked, self.executed = [], 0
        self._drawn, self._count = {}, 0
        self._declines, self._breaks, self._fails = declines, breaks, fails

    def execute(self, batch, on_layer_group=None):
        self.executed += 1
        assert UNREAD not in [token for chunk in batch.chunks for token in chunk.tokens]
        self._drawn = {chunk.request_id: chunk.end for chunk in batch.chunks}
        return super().execute(batch, on_layer_group)

    def launch(self, batch):
        self._count += 1
        number = self._count
        if number in self._declines:
            return None
        self.asked.append(f"launch {number}")
        if number in self._breaks:
            raise RuntimeError("no memory")
        for chunk in batch.chunks:
            assert not chunk.is_unread or self._drawn[chunk.request_id] == chunk.start
        self._drawn = {chunk.request_id: chunk.end for chunk in batch.chunks}

        def collect():
            self.asked.append(f"collect {number}")
            if number in self._fails:
                raise BadLogits("not finite")
            return drawn_from(batch)

        return collect


async def answered(executor, request) -> list[int]:
    network = LocalNetwork()
    gateway = network.join("gateway-0")
    async with hosted(network, "mixed-0", Role.MIXED, executor=executor) as host:
        gateway.send("mixed-0", Start(request, 1))
        tokens = await tokens_of(gateway, request.sampling.max_tokens)
        await until(lambda: is_empty(host))
    assert [token.index for token in tokens] == list(range(len(tokens)))
    return [token.token for token in tokens]


REQUEST = Request("r1", prompt_of("r"), Sampling(max_tokens=6))


async def test_a_batch_is_launched_before_the_last_one_is_collected():
    executor = Ahead()
    assert await answered(executor, REQUEST) == [5, 6, 7, 8, 9, 10]
    assert executor.executed == 1
    assert executor.asked == [
        "launch 1", "launch 2", "collect 1", "launch 3", "collect 2", "launch 4", "collect 3",
        "launch 5", "collect 4", "collect 5",
    ]  # fmt: skip


@pytest.mark.parametrize("declined", [1, 2, 3, 5])
async def test_what_cannot_be_launched_is_asked_for_again_or_executed(declined):
    executor = Ahead(declines=(declined,))
    assert await answered(executor, REQUEST) == [5, 6, 7, 8, 9, 10]


async def failed(executor) -> tuple[Dropped, int]:
    """What the request is told, and how many tokens it had before."""
    network = LocalNetwork()
    gateway, tokens = network.join("gateway-0"), 0
    async with hosted(network, "mixed-0", Role.MIXED, executor=executor) as host:
        gateway.send("mixed-0", Start(REQUEST, 1))
        async with asyncio.timeout(PATIENCE_S):
            while not isinstance(message := (await gateway.receive())[1], Dropped):
                tokens += len(message.tokens)
        assert is_empty(host)
    return message, tokens


@pytest.mark.parametrize("failing", [1, 2, 4])
async def test_the_batch_behind_one_that_fails_is_waited_for_before_anything_else(failing):
    executor = Ahead(fails=(failing,))
    dropped, tokens = await failed(executor)
    assert (dropped.error, tokens) == ("BatchFailed", failing)
    at = executor.asked.index(f"collect {failing}")
    assert executor.asked[at:] == [f"collect {failing}", f"collect {failing + 1}"]


@pytest.mark.parametrize("breaking", [1, 2, 4])
async def test_a_launch_that_fails_costs_its_own_batch_alone(breaking):
    executor = Ahead(breaks=(breaking,))
    dropped, tokens = await failed(executor)
    assert (dropped.error, tokens) == ("BatchFailed", breaking)
    assert "no memory" in dropped.reason


class Hanging(Ahead):
    """Its second batch is never over, until the test lets it go."""

    def __init__(self):
        super().__init__()
        self.let_go = threading.Event()

    def launch(self, batch):
        collect = super().launch(batch)
        if self._count < 2:
            return collect

        def hang():
            assert self.let_go.wait(PATIENCE_S)
            return collect()

        return hang


async def test_a_batch_behind_another_is_waited_for_within_bounds():
    network = LocalNetwork()
    gateway, executor = network.join("gateway-0"), Hanging()
    try:
        with pytest.raises(ExceptionGroup) as caught:
            await run_broken(network, gateway, executor, pass_s=0.05)
    finally:
        executor.let_go.set()
    assert caught.group_contains(InstanceLost, match="a pass has not returned")
