"""How much of a prompt a cached prefix spared, from the instance to what a plan is drawn from."""

from cluster.gateway.answer import Answer, Choice
from cluster.gateway.telling import ended
from cluster.instance.instance import Instance, InstanceSettings
from cluster.watching.usage import UsageReporter
from engine.batch import Drawn, StepResult
from engine.blocks import BlockPool
from engine.detokenizer import Detokenizer
from engine.events import Timeline
from engine.layout import KvLayout
from engine.messages import Role, Start, Token, Tokens
from engine.request import Request, Sampling
from kvtransfer.transfer import TransferSettings
from placement.role import RoleSettings
from placement.scaling.drift import Shape
from prefill.scheduler import PrefillSettings
from tests.cluster.serving import TOKENIZER

BLOCK_TOKENS = 4
PROMPT = tuple(range(1, 20))


def instance() -> Instance:
    settings = InstanceSettings(
        RoleSettings(PrefillSettings(token_budget=8)), TransferSettings(layer_groups=1)
    )
    pool = BlockPool(32, BLOCK_TOKENS, cache_prefixes=True)
    layout = KvLayout("toy", 2, 1, 4, BLOCK_TOKENS, "float32")
    return Instance("mixed-0", Role.MIXED, pool, layout, settings=settings, eos=frozenset())


def answered(one: Instance, request: Request) -> list[Token]:
    """Every token of the answer; prompts take several batches."""
    one.receive("gateway", Start(request, 1), 0.0)
    now = 0.0
    while (batch := one.next_batch(now)) is not None:
        now += 1.0
        drawn = tuple(Drawn(c.request_id, 7) for c in batch.chunks if c.draw is not None)
        one.finish(batch, StepResult(drawn), now)
    told = [envelope.message for envelope in one.take_outbox()]
    assert one.pool.counts().owned == 0
    return [token for said in told if isinstance(said, Tokens) for token in said.tokens]


def shape_of(one: Instance, name: str) -> Shape:
    """As the gateway's report to the controller has it."""
    request = Request(name, PROMPT, Sampling(max_tokens=3, ignore_eos=True))
    choice = Choice(
        Answer(name, "", 0.0, len(PROMPT)),
        0,
        request,
        timeline=Timeline(0.0),
        text=Detokenizer(TOKENIZER),
    )
    for number, token in enumerate(answered(one, request)):
        choice.push(token, 1.0 + number)
    reporter = UsageReporter("gateway-0", None)
    reporter.ended(ended(choice, "length", None))
    (shape,) = reporter.take(0).ended
    return shape


def test_a_prefix_that_was_cached_is_told_and_a_first_prompt_has_none():
    one = instance()
    assert shape_of(one, "first") == Shape(len(PROMPT), 3, 0)
    assert shape_of(one, "second") == Shape(len(PROMPT), 3, 16)
    one.pool.forget_prefixes()
    assert shape_of(one, "third") == Shape(len(PROMPT), 3, 0)
