"""Where a request goes: which instance prefills it and which one decodes.

Costs are in units of the request's own targets: predicted TTFT over the TTFT target plus
predicted TPOT over the TPOT target. What was dispatched but is not in an instance's load yet is
counted from a ledger until the instance confirms it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from engine.blocks import blocks_for, prefix_hashes
from placement.line import Line
from placement.routing.prefixes import PrefixIndex

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engine.messages import Load
    from engine.request import Request
    from engine.slo import Slo
    from placement.view import View


SEQUENCES_OF_FIXED_COST = 16
"""A step's cost is mostly fixed: about as much as this many sequences add to it."""
DEAREST_CROSSING = 1.0
"""In TPOT targets: a request's KV crosses between nodes only once, so that a partner elsewhere that
is much less loaded is worth it however long that takes."""


class Policy(str, Enum):
    DEFAULT = "default"
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"


@dataclass(frozen=True, slots=True)
class RouterSettings:
    policy: Policy = Policy.DEFAULT
    prefix_block_tokens: int = 32
    """Granularity of remembered prefixes; instances may use another."""
    prefill_tokens_s: float = 2000.0
    """Prefill speed assumed until the first answers tell it."""
    handoff_s: float = 0.01
    """What a hand-off adds before the second token, against decoding where it was prefilled."""
    crossing_token_s: float = 0.0
    """How much longer a prompt token's KV takes to another node than within one. With it a decode
    instance is preferred whose stages lie on the nodes of the prefilling one's, unless another is
    much less loaded; a plan whose pools stay together sets it."""
    local_prompt_tokens: int = 512
    """The longest uncached prompt that a decode instance may prefill itself."""
    local_slack: float = 0.3
    """The share of the TPOT target that a decode instance's step must leave for that."""
    local_ttft_share: float = 0.8
    """It does so only if its predicted TTFT is below this share of that of a hand-off."""
    growth_tokens: int = 64
    """Output tokens to have room for when a sequence is placed."""


@dataclass(frozen=True, slots=True)
class Route:
    """A choice: with `decode` None the prefilling instance goes on decoding."""

    prefill: str
    decode: str | None = None
    cached_tokens: int = 0
    ttft_s: float = 0.0
    """Predicted when chosen."""
    work_tokens: int = 0
    """Prompt tokens to compute before the first token: its own and those ahead of it."""
    chain: tuple[bytes, ...] = field(default=(), repr=False, compare=False)
    """Hashes of the prompt's blocks."""

    @property
    def decoder(self) -> str:
        return self.decode or self.prefill


class _Instance:
    """An instance as the router counts it: its load, and what is on its way there.

    The figures that every decision compares are kept ready, since there are many instances.
    """

    __slots__ = (
        "ahead_tokens",
        "block_tokens",
        "decodes",
        "ledger",
        "left_blocks",
        "line",
        "load",
        "name",
        "node",
        "prefills",
        "speed",
        "total_blocks",
        "tpot_s",
    )

    def __init__(self, load: Load, typical: Line) -> None:
        self.name = load.instance
        self.node = ""
        self.speed = Line(0.0)
        self.line = typical
        """What predicts its TTFT: its own speed once that has been measured."""
        self.ledger: dict[str, tuple[int, int]] = {}
        """Per unconfirmed request: prompt tokens to compute, and blocks."""
        self.refresh(load)

    def refresh(self, load: Load) -> None:
        self.load = load
        self.prefills, self.decodes = load.role.prefills, load.role.decodes
        self.block_tokens, self.total_blocks = load.block_tokens, max(load.total_blocks, 1)
        if self.ledger:
            for running in load.sequences:
                self.ledger.pop(running.request_id, None)
        coming = self.ledger.values()
        self.ahead_tokens = load.queued_tokens + sum(tokens for tokens, _ in coming)
        spoken_for = load.wanted_blocks + sum(blocks for _, blocks in coming)
        self.left_blocks = load.free_blocks - spoken_for
        self._pace()

    def expect(self, request_id: str, tokens: int, blocks: int) -> None:
        self.ledger[request_id] = (tokens, blocks)
        self.ahead_tokens += tokens
        self.left_blocks -= blocks
        self._pace()

    def confirm(self, request_id: str) -> None:
        expected = self.ledger.pop(request_id, None)
        if expected is None:
            return
        tokens, blocks = expected
        self.ahead_tokens -= tokens
        self.left_blocks += blocks
        self._pace()

    def observe(self, work_tokens: int, ttft_s: float) -> None:
        self.speed.observe(work_tokens, ttft_s)
        self.line = self.speed

    @property
    def requests(self) -> int:
        return self.load.queue_requests + self.load.running_sequences + len(self.ledger)

    def _pace(self) -> None:
        """A step with the sequences that are on their way and one more."""
        sequences = self.load.running_sequences + SEQUENCES_OF_FIXED_COST
        self.tpot_s = self.load.step_s * (1.0 + (len(self.ledger) + 1) / sequences)


@dataclass(frozen=True, slots=True)
class _Ask:
    """One request as the costs see it."""

    slo: Slo
    prompt_tokens: int
    chain: tuple[bytes, ...]
    cached: dict[str, int]
    """Prompt tokens that each instance probably need not compute."""
    room_tokens: int

    def own_tokens(self, instance: _Instance) -> int:
        return self.prompt_tokens - self.cached.get(instance.name, 0)

    def ttft_s(self, instance: _Instance) -> float:
        line, cached = instance.line, self.cached.get(instance.name, 0)
        work = instance.ahead_tokens + self.prompt_tokens - cached
        return line.base + line.slope * work

    def ttft_between_decodes_s(self, instance: _Instance) -> float:
        """Prompt chunks ride in what the decode steps leave of the TPOT target."""
        return self.ttft_s(instance) / max(self.slack(instance), 0.01)

    def slack(self, instance: _Instance) -> float:
        return 1.0 - instance.tpot_s / self.slo.tpot_s

    def decode_cost(self, instance: _Instance) -> float:
        """Pace against its target, dearer beyond it, and how full the pool would be."""
        pace = instance.tpot_s / self.slo.tpot_s
        left = instance.left_blocks + -self.room_tokens // instance.block_tokens
        used = 1.0 - left / instance.total_blocks
        cost = pace + used if pace <= 1.0 else 5.0 * pace - 4.0 + used
        return cost if left >= 0 else cost + 10.0


_Priced = tuple[float, _Instance]
_Choice = tuple[float, _Instance, _Instance | None]


class Router:
    """`choose` only looks; `dispatched`, `prefilled` and `ended` keep the ledger."""

    def __init__(self, settings: RouterSettings | None = None) -> None:
        self.settings = settings or RouterSettings()
        self._instances: dict[str, _Instance] = {}
        self._prefixes = PrefixIndex()
        self._typical = Line(1.0 / self.settings.prefill_tokens_s)
        self._under_way: dict[str, tuple[Route, float]] = {}
        self._view: View | None = None
        self._usable: list[_Instance] = []
        self._turn = 0

    def choose(self, request: Request, view: View, avoid: Sequence[str] = ()) -> Route | None:
        """The best route now, or None while no instance can take the request.

        Instances to avoid are taken only where there are no others.
        """
        self._read(view)
        usable = self._usable
        ask = self._ask(request)
        if avoid:
            route = self._pick(ask, [one for one in usable if one.name not in avoid])
            if route is not None:
                return route
        return self._pick(ask, usable)

    def dispatched(self, request: Request, route: Route, now: float) -> None:
        self._release(request.id)
        self._under_way[request.id] = (route, now)
        self._turn += 1
        own = len(request.prompt) - route.cached_tokens
        for name, tokens in ((route.prefill, own), (route.decode, 0)):
            instance = None if name is None else self._instances.get(name)
            if instance is not None:
                blocks = blocks_for(self._room_tokens(request), instance.load.block_tokens)
                instance.expect(request.id, tokens, blocks)
        self._remember(route.prefill, route.chain)

    def prefilled(self, request_id: str, now: float) -> None:
        """The first token arrived: learn how long its work took, and stop counting it."""
        if request_id not in self._under_way:
            return
        route, dispatched_s = self._under_way[request_id]
        instance = self._instances.get(route.prefill)
        if instance is not None:
            instance.observe(route.work_tokens, now - dispatched_s)
            self._typical.observe(route.work_tokens, now - dispatched_s)
            instance.confirm(request_id)

    def ended(self, request_id: str, tokens: Sequence[int] = (), tenant: str = "") -> None:
        """The request is over; its whole text may be the beginning of a later one."""
        route = self._release(request_id)
        decoder = None if route is None else self._instances.get(route.decoder)
        if route is not None and decoder is not None and decoder.prefills:
            self._remember(decoder.name, self._chain(tokens, tenant, route.chain))

    @property
    def measured(self) -> bool:
        """Whether enough first tokens have been timed for predictions to mean something."""
        return self._typical.observations >= 8

    def alone_s(self, route: Route, prompt_tokens: int) -> float:
        """The TTFT of this route if nothing were ahead of the request."""
        return self._instances[route.prefill].line.at(prompt_tokens - route.cached_tokens)

    def queue_s(self, tokens: int) -> float:
        """How long the instances that prefill need for this many tokens more."""
        slopes = [one.line.slope for one in self._instances.values() if one.prefills]
        speed = sum(1.0 / slope for slope in slopes if slope > 0.0)
        return tokens / speed if speed else 0.0

    # Reading the view.

    def _read(self, view: View) -> None:
        if view is self._view:
            return
        self._view = view
        for seen in view.instances:
            load = seen.load
            instance = self._instances.get(load.instance)
            if instance is None:
                instance = self._instances[load.instance] = _Instance(load, self._typical)
            elif instance.load is not load:
                instance.refresh(load)
            instance.node = seen.node
        if len(self._instances) > len(view.instances):
            for gone in self._instances.keys() - {seen.load.instance for seen in view.instances}:
                del self._instances[gone]
                self._prefixes.forget(gone)
        self._usable = [self._instances[one.id] for one in view.instances if one.takes_requests]

    def _ask(self, request: Request) -> _Ask:
        chain = self._chain(request.prompt, request.tenant)
        size = self.settings.prefix_block_tokens
        # The last prompt token is always computed: the first draw needs its logits.
        most = len(request.prompt) - 1
        hits = self._prefixes.hits(chain)
        cached = {name: min(depth * size, most) for name, depth in hits.items()}
        room_tokens = self._room_tokens(request)
        return _Ask(request.slo, len(request.prompt), chain, cached, room_tokens)

    def _chain(
        self, tokens: Sequence[int], tenant: str, known: Sequence[bytes] = ()
    ) -> tuple[bytes, ...]:
        return tuple(prefix_hashes(tokens, self.settings.prefix_block_tokens, tenant, known))

    def _room_tokens(self, request: Request) -> int:
        growth = min(self.settings.growth_tokens, request.sampling.max_tokens)
        return len(request.prompt) + growth

    def _remember(self, name: str, chain: tuple[bytes, ...]) -> None:
        instance = self._instances.get(name)
        if instance is not None and chain:
            pool_tokens = instance.load.total_blocks * instance.load.block_tokens
            capacity = max(pool_tokens // self.settings.prefix_block_tokens, 1)
            self._prefixes.remember(name, chain, capacity)

    def _release(self, request_id: str) -> Route | None:
        entry = self._under_way.pop(request_id, None)
        if entry is None:
            return None
        for name in (entry[0].prefill, entry[0].decoder):
            if name in self._instances:
                self._instances[name].confirm(request_id)
        return entry[0]

    # Choosing.

    def _pick(self, ask: _Ask, usable: list[_Instance]) -> Route | None:
        match self.settings.policy:
            case Policy.DEFAULT:
                return self._cheapest(ask, usable)
            case Policy.LEAST_LOADED:
                by_load = sorted(usable, key=lambda one: one.requests)
                return self._first(ask, by_load, by_load)
            case Policy.ROUND_ROBIN:
                return self._first(ask, _rotated(usable, self._turn), _rotated(usable, self._turn))

    def _first(
        self, ask: _Ask, prefills: list[_Instance], decodes: list[_Instance]
    ) -> Route | None:
        """The first instance that prefills, with the first that decodes if it needs one."""
        prefill = next((one for one in prefills if one.prefills), None)
        decode = next((one for one in decodes if one.decodes), None)
        if prefill is None:
            return None if decode is None else self._route(ask, decode, None)
        return self._route(ask, prefill, None if prefill.decodes else decode)

    def _cheapest(self, ask: _Ask, usable: list[_Instance]) -> Route | None:
        """The lowest cost of mixed instances, a hand-off, and decode instances with slack."""
        target_s = ask.slo.ttft_s
        costs = [(ask.decode_cost(one), one) for one in usable if one.decodes]
        choices: list[_Choice] = [
            (cost + ask.ttft_s(one) / target_s, one, None) for cost, one in costs if one.prefills
        ]
        prefills = [(ask.ttft_s(one), one) for one in usable if not one.decodes]
        if costs and prefills:
            first, then = min(prefills, key=_cost), min(costs, key=_cost)
            choices.append(self._pair(ask, first, then))
            if self._crossing(ask, first[1], then[1]):
                choices += self._beside(ask, prefills, costs)
            choices += self._local(ask, costs, first[0] * self.settings.local_ttft_share)
        choices = choices or self._alone(ask, usable)
        if not choices:
            return None
        _, prefill, decode = min(choices, key=_cost)
        return self._route(ask, prefill, decode)

    def _pair(self, ask: _Ask, first: _Priced, then: _Priced) -> _Choice:
        """A hand-off, of these costs for the first token and for those after it."""
        (ttft_s, prefill), (cost, decode) = first, then
        cost += self.settings.handoff_s / ask.slo.tpot_s + self._crossing(ask, prefill, decode)
        return cost + ttft_s / ask.slo.ttft_s, prefill, decode

    def _beside(
        self, ask: _Ask, prefills: list[_Priced], costs: list[_Priced]
    ) -> Iterator[_Choice]:
        """The best pair on each node that has any."""
        thens = _by_node(costs)
        for node, firsts in _by_node(prefills).items():
            if node in thens:
                yield self._pair(ask, min(firsts, key=_cost), min(thens[node], key=_cost))

    def _crossing(self, ask: _Ask, prefill: _Instance, decode: _Instance) -> float:
        """What it costs that the KV leaves its node."""
        if prefill.node == decode.node:
            return 0.0
        longer_s = self.settings.crossing_token_s * ask.prompt_tokens
        return min(longer_s / ask.slo.tpot_s, DEAREST_CROSSING)

    def _local(self, ask: _Ask, costs: list[_Priced], below_s: float) -> list[_Choice]:
        """Decode instances that would give a short prompt's first token sooner."""
        longest, slack = self.settings.local_prompt_tokens, self.settings.local_slack
        if ask.prompt_tokens > longest and not ask.cached:
            return []
        return [
            (cost + ask.ttft_between_decodes_s(one) / ask.slo.ttft_s, one, None)
            for cost, one in costs
            if not one.prefills
            and ask.ttft_s(one) < below_s
            and ask.own_tokens(one) <= longest
            and ask.slack(one) >= slack
            and ask.ttft_between_decodes_s(one) < below_s
        ]

    def _alone(self, ask: _Ask, usable: list[_Instance]) -> list[_Choice]:
        """While a whole role is missing, the other serves requests by itself."""
        return [(ask.decode_cost(one) + ask.ttft_s(one), one, None) for one in usable]

    def _route(self, ask: _Ask, prefill: _Instance, decode: _Instance | None) -> Route:
        between_decodes = decode is None and not prefill.prefills
        return Route(
            prefill.name,
            None if decode is None else decode.name,
            ask.cached.get(prefill.name, 0),
            ask.ttft_between_decodes_s(prefill) if between_decodes else ask.ttft_s(prefill),
            prefill.ahead_tokens + ask.own_tokens(prefill),
            ask.chain,
        )


def _cost(choice: tuple[float, *tuple[object, ...]]) -> float:
    """Ties go to the first, and views are in order of id."""
    return choice[0]


def _by_node(priced: list[_Priced]) -> dict[str, list[_Priced]]:
    found: dict[str, list[_Priced]] = {}
    for one in priced:
        found.setdefault(one[1].node, []).append(one)
    return found


def _rotated(instances: list[_Instance], turn: int) -> list[_Instance]:
    if not instances:
        return []
    first = turn % len(instances)
    return instances[first:] + instances[:first]
