"""A batch that fails costs the one request behind it its answer, and nobody else anything."""

import asyncio
from math import nan

import pytest

from cluster.instance.host import Host
from cluster.instance.instance import Instance, InstanceSettings
from cluster.instance.mover import InstanceMover
from cluster.instance.trials import Trials
from cluster.links import LocalNetwork
from decode.scheduler import DecodeSettings, DecodeStep
from engine.batch import Batch, Chunk, StepResult, Swap
from engine.blocks import BlockPool
from engine.clock import SystemClock
from engine.errors import BadLogits, InstanceLost
from engine.layout import KvLayout
from engine.messages import Dropped, Load, Role, Start, Tokens
from engine.request import Request, Sampling
from placement.role import RoleSettings, Step
from tests.cluster.engines import BLOCK_TOKENS, BLOCKS, engine
from tests.cluster.serving import PATIENCE_S
from tests.cluster.test_host import CountingExecutor
from tests.engine import tiny

LAYOUT = KvLayout("m", 2, 1, 8, 4, "float32")


def make_instance(blocks=32, **role) -> Instance:
    pool = BlockPool(blocks, 4)
    settings = InstanceSettings(role=RoleSettings(**role))
    return Instance("mixed-0", Role.MIXED, pool, LAYOUT, settings=settings, eos=frozenset())


def start(instance: Instance, *names: str, prompt: int = 5, tokens: int = 9) -> None:
    for name in names:
        request = Request(name, tuple(range(1, prompt + 1)), Sampling(max_tokens=tokens))
        instance.receive("gateway-0", Start(request, 1), 0.0)


def names_of(batch: Batch) -> list[str]:
    return [chunk.request_id for chunk in batch.chunks]


def run(instance: Instance, batch: Batch) -> None:
    instance.finish(batch, CountingExecutor().execute(batch), 0.0)


def dropped(instance: Instance) -> list[Dropped]:
    sent = instance.take_outbox()
    return [one.message for one in sent if isinstance(one.message, Dropped)]


def step_of(*names: str) -> Step:
    chunks = tuple(Chunk(name, (1,), 0, (0,), None) for name in names)
    return Step(Batch(chunks), (), chunks, DecodeStep())


def test_a_failed_batch_is_tried_in_halves_until_one_request_fails_alone():
    trials, whole = Trials(), step_of(*"abcdefgh")
    ran = []
    batch = whole.batch
    while (blamed := trials.failed(batch)) is None:
        batch = trials.cut(whole).batch
        ran.append("".join(names_of(batch)))
        while "f" not in names_of(batch):
            trials.passed()
            batch = trials.cut(whole).batch
            ran.append("".join(names_of(batch)))
    assert blamed == "f"
    assert ran == ["abcd", "efgh", "ef", "e", "f"]
    assert names_of(trials.cut(whole).batch) == ["g", "h"]
    assert names_of(trials.cut(whole).batch) == list("abcdefgh")


def test_a_group_that_has_no_part_in_a_step_does_not_hold_it_up():
    trials = Trials()
    trials.failed(step_of("a", "b").batch)
    assert names_of(trials.cut(step_of("c")).batch) == ["c"]


def test_only_the_request_that_fails_alone_is_given_back():
    instance = make_instance()
    start(instance, "a", "bad", "c")
    gone: list[Dropped] = []
    while instance.load().sequences:
        batch = instance.next_batch(0.0)
        if "bad" in names_of(batch):
            instance.fail_batch(batch, BadLogits("not finite"), 0.0)
        else:
            run(instance, batch)
        gone += dropped(instance)
    assert [(one.request_id, one.epoch, one.error) for one in gone] == [("bad", 1, "BatchFailed")]
    assert instance.pool.available == 32


def test_an_aborted_requests_blocks_are_freed_when_its_batch_fails():
    from engine.messages import Abort

    instance = make_instance()
    start(instance, "a")
    batch = instance.next_batch(0.0)
    instance.receive("gateway-0", Abort("a", 1), 0.0)
    instance.fail_batch(batch, BadLogits("not finite"), 0.0)
    assert instance.pool.available == 32
    assert not dropped(instance)


def test_sequences_whose_swap_failed_are_replayed_since_nobody_knows_what_was_moved():
    settings = DecodeSettings(host_slots=64, swap_block_s=0.0, max_sequences=4)
    instance = make_instance(blocks=8, decode=settings)
    start(instance, "old", "new", prompt=10, tokens=20)
    gone: list[Dropped] = []
    swapped: set[str] = set()
    while instance.load().sequences:
        batch = instance.next_batch(0.0)
        if batch.swaps and not swapped:
            swapped = {swap.request_id for swap in batch.swaps}
            instance.fail_batch(batch, RuntimeError("no memory"), 0.0)
        else:
            run(instance, batch)
        gone += dropped(instance)
    assert swapped
    assert swapped <= {one.request_id for one in gone}
    assert instance.pool.available == 8


def test_a_batch_that_only_moves_blocks_has_nobody_to_blame():
    instance = make_instance()
    batch = Batch((), (Swap("a", (1,), (1,), to_host=True),))
    instance._steps.append(Step(batch, (), (), DecodeStep()))
    with pytest.raises(InstanceLost):
        instance.fail_batch(batch, RuntimeError("no memory"), 0.0)


@pytest.mark.parametrize("error", [BadLogits("not finite"), RuntimeError("device lost")])
def test_an_instance_on_which_everything_fails_gives_up_unless_the_requests_explain_it(error):
    instance = make_instance()
    start(instance, "a", "b", "c", "d")

    def fail_everything() -> None:
        while instance.load().sequences:
            instance.fail_batch(instance.next_batch(0.0), error, 0.0)

    if isinstance(error, BadLogits):
        fail_everything()
        assert len(dropped(instance)) == 4
        assert instance.pool.available == 32
    else:
        with pytest.raises(InstanceLost, match="3 requests in a row"):
            fail_everything()


async def answers(link, names) -> tuple[dict[str, list[int]], list[Dropped]]:
    """Tokens of each request, and who was given back, once everyone has ended."""
    tokens: dict[str, list[int]] = {}
    gone: list[Dropped] = []
    ended: set[str] = set()
    async with asyncio.timeout(PATIENCE_S):
        while ended != set(names):
            _, message = await link.receive()
            match message:
                case Tokens(news):
                    for one in news:
                        tokens.setdefault(one.request_id, []).append(one.token)
                        ended |= {one.request_id} if one.finish else set()
                case Dropped():
                    gone.append(message)
                    ended.add(message.request_id)
                case Load():
                    continue
    return tokens, gone


class Recorder:
    """The real runner, and how large its batches were."""

    def __init__(self, runner) -> None:
        self.runner, self.sizes, self.launch = runner, [], runner.launch

    def execute(self, batch: Batch, on_layer_group=None) -> StepResult:
        self.sizes.append(len(batch.chunks))
        return self.runner.execute(batch, on_layer_group)


async def served(one, requests) -> tuple[dict[str, list[int]], list[Dropped], list[int]]:
    """Answers of an instance over a real engine that is given all requests at once."""
    network = LocalNetwork()
    gateway = network.join("gateway-0")
    pool = BlockPool(BLOCKS, BLOCK_TOKENS)
    instance = Instance(
        "mixed-0", Role.MIXED, pool, one.layout, settings=InstanceSettings(), eos=frozenset()
    )
    recorder = Recorder(one.executor)
    for request in requests:
        instance.receive("gateway-0", Start(request, 1), 0.0)
    async with asyncio.TaskGroup() as tasks:
        host = Host(
            instance,
            executor=recorder,
            link=network.join("mixed-0"),
            mover=InstanceMover([], tasks),
            clock=SystemClock(),
        )
        running = tasks.create_task(host.run())
        tokens, gone = await answers(gateway, [request.id for request in requests])
        assert not running.done()
        running.cancel()
    assert pool.available == BLOCKS
    return tokens, gone, recorder.sizes


async def test_logits_that_are_not_finite_end_one_request_on_a_real_engine(tmp_path):
    """The bias makes the real sampler raise for a batch of six."""
    tiny.make("llama3", tmp_path / "tiny", vocab_size=2048)
    greedy = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
    bad = Sampling(max_tokens=12, temperature=0.0, logit_bias=((5, nan),))
    good = [Request(f"r{n}", tuple(range(3 + n, 12 + n)), greedy) for n in range(5)]
    with engine(tmp_path / "tiny", tmp_path / "meet", "mixed-0") as one:
        alone, _, _ = await served(one, good)
        everyone = [*good[:3], Request("bad", (3, 4, 5), bad), *good[3:]]
        tokens, gone, sizes = await served(one, everyone)
    assert [(one.request_id, one.error) for one in gone] == [("bad", "BatchFailed")]
    assert "BadLogits" in gone[0].reason
    assert tokens == alone
    assert sizes[0] == 6
    assert 1 in sizes
