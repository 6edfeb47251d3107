"""The same requests give the same tokens and logprobs, whichever way they go: prefilled and decoded
in one place, handed off, or migrated five times, between instances of different parallelism."""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cluster.instance.instance import Instance
from engine import wire
from engine.batch import Batch, StepResult, chunk_of
from engine.blocks import BlockPool
from engine.messages import Confirmed, Migrated, Role, Sealed, Tokens
from engine.request import Grammar, Request, Sampling, start_sequence
from engine.slo import Slo
from placement.routing.router import Route
from tests.cluster.engines import BLOCK_TOKENS, BLOCKS, Engine, engine
from tests.engine import tiny
from tests.simulation.scene import Scene
from tests.simulation.world import Node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from engine.batch import Chunk, Drawn, Logprobs
    from engine.errors import TransferError
    from engine.messages import Message
    from kvtransfer.transfer import PullOrder

TOKENS, MIGRATIONS = 56, 5
LOGPROBS, NEAR = 5, 1e-3
"""Ranks that share a layer add in another order than one that has it all."""
VOCAB = 2048
NUMBERS = Grammar(
    "json_schema",
    json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 60}),
)
LETTERS = Grammar("regex", "([a-f]{2} ){200}")
PENALTIES = {"presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.2}


def sampling(**options) -> Sampling:
    return Sampling(max_tokens=TOKENS, ignore_eos=True, **options)


SAMPLINGS = {
    "greedy": sampling(temperature=0.0),
    "sampled": sampling(seed=7, temperature=1.1, top_p=0.9, top_k=50, logprobs=LOGPROBS),
    "penalised": sampling(seed=8, **PENALTIES),
    "greedy penalised": sampling(temperature=0.0, logprobs=LOGPROBS, **PENALTIES),
    "numbers": sampling(seed=9, grammar=NUMBERS, logprobs=LOGPROBS),
    "letters": sampling(seed=10, temperature=0.0, grammar=LETTERS),
    **{
        f"branch#{k}": sampling(
            seed=100 + k, temperature=1.0, min_p=0.02, logprobs=LOGPROBS if k % 2 else None
        )
        for k in range(4)
    },
}


def ask(name: str) -> Request:
    """Branches share their prompt; every other request has its own."""
    seed = sum(name.partition("#")[0].encode())
    prompt = tuple(np.random.default_rng(seed).integers(3, VOCAB, 10 + seed % 13).tolist())
    return Request(name, prompt, SAMPLINGS[name], Slo(5.0, 1.0))


class Played:
    """What the world runs batches with, layer groups and all."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._result = StepResult(())

    def swap(self, swaps: tuple[object, ...]) -> None:
        """The executor swaps with the batch."""

    def compute(self, batch: Batch, layers: range) -> None:
        if layers.start == 0:
            self._result = self.engine.executor.execute(batch)

    def draw(self, batch: Batch, duration_s: float) -> StepResult:
        return StepResult(self._result.drawn, duration_s)


class EngineScene(Scene):
    """The scripted world over real engines; KV is compared bit for bit at each commit."""

    def __init__(
        self,
        engines: dict[str, Engine],
        wanted: dict[str, list[int]],
        seed: int,
        *,
        cache_prefixes: bool = False,
    ) -> None:
        self._engines, self._wanted = engines, wanted
        self._cache_prefixes = cache_prefixes
        self._seals: dict[str, Sealed] = {}
        self._moves: dict[str, int] = {}
        self._chance = Random(seed)
        self.compared = 0
        self.logprobs: dict[str, dict[int, Logprobs | None]] = {}
        """As they reached the gateway, by the token's index."""
        super().__init__(*engines, seed=seed)

    def ask_for(self, name: str, route: Route) -> None:
        self._routes[name] = route
        self.happen(0.05, lambda: self._submit(ask(name)))

    def keep_moving(self, name: str, at: str, to: str) -> None:
        """Migrates a request back and forth, at moments that chance chooses."""
        delay_s = self._chance.uniform(0.0, 0.05)
        self.happen(delay_s, lambda: self.migrate(name, at, to))

    def expected(self, request: Request) -> list[int]:
        return self._wanted[request.id]

    def _node(self, name, settings, blocks) -> Node:
        one = self._engines[name]
        pool = BlockPool(BLOCKS, BLOCK_TOKENS, cache_prefixes=self._cache_prefixes)
        role = self._roles[name]
        instance = Instance(name, role, pool, one.layout, settings=settings, eos=frozenset())
        return Node(instance, Played(one))

    def _copy(self, node: Node, source: Node, order: PullOrder) -> None:
        error: TransferError | None = node.model.engine.pull(order)
        assert error is None, error

    def send(self, sender: str, to: str, message: Message) -> None:
        if isinstance(message, Sealed):
            self._seals[message.transfer] = message
        if isinstance(message, Confirmed):
            self._compare(sender, to, message)
        super().send(sender, to, message)

    def _compare(self, source: str, target: str, confirmed: Confirmed) -> None:
        arriving = self.nodes[target].instance._transfers._arrivals._open.get(confirmed.transfer)
        if arriving is None:
            return
        tokens, sealed = confirmed.computed, self._seals[confirmed.transfer]
        sent = self._engines[source].read(sealed.blocks, tokens)
        arrived = self._engines[target].read(arriving.blocks, tokens)
        assert np.array_equal(sent.view(np.uint32), arrived.view(np.uint32)), confirmed.transfer
        self.compared += 1

    def _deliver(self, sender: str, to: str, data: bytes) -> None:
        before, message = len(self.ended), wire.decode(data)
        if isinstance(message, Tokens):
            for token in message.tokens:
                self.logprobs.setdefault(token.request_id, {})[token.index] = token.logprobs
        super()._deliver(sender, to, data)
        for migrated in self.ended[before:]:
            self._migrated(migrated)

    def _migrated(self, migrated: Migrated) -> None:
        assert migrated.outcome == "committed", migrated
        name = migrated.request_id
        self._moves[name] = self._moves.get(name, 0) + 1
        if self._moves[name] < MIGRATIONS:
            self.keep_moving(name, migrated.target, migrated.source)


def alone(engine: Engine, asked: Request) -> list[Drawn]:
    """The answer computed by a bare engine, one sequence and one batch at a time."""
    sequence, answer = start_sequence(asked, 1), []
    sequence.blocks = list(range(BLOCKS))
    while sequence.output_tokens < TOKENS:
        chunk: Chunk = chunk_of(sequence, sequence.uncomputed)
        (drawn,) = engine.executor.execute(Batch((chunk,))).drawn
        sequence.computed = chunk.end
        sequence.tokens.append(drawn.token)
        answer.append(drawn)
    return answer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "tiny"
    tiny.make("llama3", path, vocab_size=VOCAB)
    return path


@pytest.fixture(scope="module")
def single(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with engine(directory, tmp_path_factory.mktemp("meet") / "alone", "decode-1") as one:
        yield one


@pytest.fixture(scope="module")
def undisturbed(single: Engine) -> dict[str, list[Drawn]]:
    return {name: alone(single, ask(name)) for name in SAMPLINGS}


@pytest.fixture(scope="module")
def wanted(undisturbed: dict[str, list[Drawn]]) -> dict[str, list[int]]:
    return {name: [drawn.token for drawn in answer] for name, answer in undisturbed.items()}


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda c: f"{c}-1")
def cut(request, directory, single, tmp_path_factory) -> Iterator[Engine]:
    """An instance of tensor x pipeline ranks, that knows the single one and is known to it."""
    meeting = tmp_path_factory.mktemp("meet") / "ranks"
    with engine(directory, meeting, "decode-0", *request.param) as ranks:
        ranks.meet(single)
        single.meet(ranks)
        yield ranks


def play(scene: EngineScene, undisturbed: dict[str, list[Drawn]]) -> None:
    scene.play()
    check_logprobs(scene, undisturbed)
    assert scene.finished == dict.fromkeys(SAMPLINGS, TOKENS)
    assert scene.seen["Start"] == len(SAMPLINGS)


def check_logprobs(scene: EngineScene, undisturbed: dict[str, list[Drawn]]) -> None:
    """Those of the tokens and of the likeliest ones, wherever each was drawn."""
    asked = {name for name, one in SAMPLINGS.items() if one.logprobs is not None}
    assert asked & scene.logprobs.keys()
    for name, told in scene.logprobs.items():
        assert all((one is not None) == (name in asked) for one in told.values())
        assert sorted(told) == list(range(TOKENS))
        for index, drawn in enumerate(undisturbed[name]):
            assert_near(told[index], drawn.logprobs)


def assert_near(got: Logprobs | None, own: Logprobs | None) -> None:
    if got is None or own is None:
        assert got is own
        return
    assert got.chosen == pytest.approx(own.chosen, abs=NEAR)
    got_top, own_top = dict(got.top), dict(own.top)
    assert list(got_top.values()) == pytest.approx(list(own_top.values()), abs=NEAR)
    for token in got_top.keys() & own_top.keys():
        assert got_top[token] == pytest.approx(own_top[token], abs=NEAR)


def test_the_requests_are_not_all_answered_alike(wanted):
    assert len({tuple(tokens) for tokens in wanted.values()}) == len(SAMPLINGS)
    assert all(len(set(tokens)) > 5 for tokens in wanted.values())


def test_aggregated_runs_give_the_tokens_and_logprobs_of_a_bare_engine(cut, wanted, undisturbed):
    scene = EngineScene({"decode-0": cut}, wanted, seed=1)
    for name in SAMPLINGS:
        scene.ask_for(name, Route("decode-0"))
    play(scene, undisturbed)


@pytest.mark.parametrize("there", ["decode-0", "decode-1"])
def test_disaggregated_runs_give_the_same_tokens_and_logprobs(
    cut, single, wanted, undisturbed, there
):
    engines = {"decode-0": cut, "decode-1": single}
    (other,) = (name for name in engines if name != there)
    scene = EngineScene(engines, wanted, seed=2)
    scene._roles[other] = Role.PREFILL
    for name in SAMPLINGS:
        scene.ask_for(name, Route(other, there))
    play(scene, undisturbed)
    assert scene.compared == len(SAMPLINGS)


@pytest.mark.parametrize("seed", [3, 4])
def test_requests_that_migrate_five_times_give_the_same_tokens_and_logprobs(
    cut, single, wanted, undisturbed, seed
):
    scene = EngineScene({"decode-0": cut, "decode-1": single}, wanted, seed)
    for number, name in enumerate(SAMPLINGS):
        at, to = ("decode-0", "decode-1") if number % 2 else ("decode-1", "decode-0")
        scene.ask_for(name, Route(at))
        scene.at_token(name, 2, lambda n=name, at=at, to=to: scene.keep_moving(n, at, to))
    play(scene, undisturbed)
    assert scene._moves == dict.fromkeys(SAMPLINGS, MIGRATIONS)
    assert scene.compared == MIGRATIONS * len(SAMPLINGS)


def test_branches_that_share_blocks_on_either_side_give_the_same_tokens_and_logprobs(
    cut, single, wanted, undisturbed
):
    engines = {"decode-0": cut, "decode-1": single}
    scene = EngineScene(engines, wanted, seed=5, cache_prefixes=True)
    branches = [name for name in SAMPLINGS if name.startswith("branch")]
    for name in branches:
        scene.ask_for(name, Route("decode-0"))

    def move_all() -> None:
        for name in branches:
            scene.keep_moving(name, "decode-0", "decode-1")

    scene.at_token(branches[-1], 2, move_all)
    scene.play()
    check_logprobs(scene, undisturbed)
    assert scene.finished == dict.fromkeys(branches, TOKENS)
    assert scene._moves == dict.fromkeys(branches, MIGRATIONS)
