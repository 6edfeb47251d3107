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
from engine.messages import Role
from placement.line import Line
from placement.prefixes import PrefixIndex

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.messages import Load
    from engine.request import Request
    from placement.view import View


SEQUENCES_OF_FIXED_COST = 16
"""A step's cost is mostly fixed: about as much as this many sequences add to it."""


class Policy(str, Enum):
    DEFAULT = "default"
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"


@dataclass(frozen=True, slots=True)
class RouterSettings:
    policy: Policy = Policy.DEFAULT
    prefix_block_tokens: int = 16
    """Granularity of remembered prefixes; instances may use another."""
    prefill_tokens_s: float = 2000.0
    """Prefill speed assumed until the first answers tell it."""
    handoff_s: float = 0.01
    """What a hand-off adds before the second token, against decoding where it was prefilled."""
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


@dataclass(slots=True, eq=False)
class _Instance:
    """An instance as the router counts it: its load, and what is on its way there."""

    load: Load
    speed: Line
    ledger: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Per unconfirmed request: prompt tokens to compute, and blocks."""
    ledger_tokens: int = 0
    ledger_blocks: int = 0

    def expect(self, request_id: str, tokens: int, blocks: int) -> None:
        self.confirm(request_id)
        self.ledger[request_id] = (tokens, blocks)
        self.ledger_tokens += tokens
        self.ledger_blocks += blocks

    def confirm(self, request_id: str) -> None:
        tokens, blocks = self.ledger.pop(request_id, (0, 0))
        self.ledger_tokens -= tokens
        self.ledger_blocks -= blocks

    def refresh(self, load: Load) -> None:
        self.load = load
        if self.ledger:
            for running in load.sequences:
                self.confirm(running.request_id)

    @property
    def name(self) -> str:
        return self.load.instance

    @property
    def requests(self) -> int:
        return self.load.queue_requests + self.load.running_sequences + len(self.ledger)

    def tpot_s(self) -> float:
        """A step with the sequences that are on their way and this one."""
        return self.load.step_s * (
            1.0 + (len(self.ledger) + 1) / (self.load.running_sequences + SEQUENCES_OF_FIXED_COST)
        )

    def crowding(self, tokens: int) -> float:
        """How full the pool would be; far above 1 where the request would not fit."""
        load = self.load
        left = load.free_blocks - self.ledger_blocks - blocks_for(tokens, load.block_tokens)
        used = 1.0 - left / max(load.total_blocks, 1)
        return used if left >= 0 else 10.0 + used


@dataclass(frozen=True, slots=True)
class _Ask:
    """One request as the costs see it."""

    request: Request
    chain: tuple[bytes, ...]
    cached: dict[str, int]
    """Prompt tokens that each instance probably need not compute."""
    room_tokens: int

    def own_tokens(self, instance: _Instance) -> int:
        return len(self.request.prompt) - self.cached.get(instance.name, 0)

    def work_tokens(self, instance: _Instance) -> int:
        ahead = instance.load.queued_tokens + instance.ledger_tokens
        return ahead + self.own_tokens(instance)


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
        self._turn = 0

    def choose(self, request: Request, view: View, avoid: Sequence[str] = ()) -> Route | None:
        """The best route now, or None while no instance can take the request.

        Instances to avoid are taken only where there are no others.
        """
        self._read(view)
        usable = [
            self._instances[one.load.instance] for one in view.instances if one.takes_requests
        ]
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
            instance.speed.observe(route.work_tokens, now - dispatched_s)
            self._typical.observe(route.work_tokens, now - dispatched_s)
            instance.confirm(request_id)

    def ended(self, request_id: str, tokens: Sequence[int] = (), tenant: str = "") -> None:
        """The request is over; its whole text may be the beginning of a later one."""
        route = self._release(request_id)
        decoder = None if route is None else self._instances.get(route.decoder)
        if route is not None and decoder is not None and decoder.load.role.prefills:
            self._remember(decoder.name, self._chain(tokens, tenant, route.chain))

    @property
    def measured(self) -> bool:
        """Whether enough first tokens have been timed for predictions to mean something."""
        return self._typical.observations >= 8

    def alone_s(self, route: Route, prompt_tokens: int) -> float:
        """The TTFT of this route if nothing were ahead of the request."""
        instance = self._instances[route.prefill]
        return self._seconds(instance, prompt_tokens - route.cached_tokens)

    def queue_s(self, tokens: int) -> float:
        """How long the instances that prefill need for this many tokens more."""
        slopes = [
            (one.speed if one.speed.observations else self._typical).slope
            for one in self._instances.values()
            if one.load.role.prefills
        ]
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
                self._instances[load.instance] = _Instance(load, Line(0.0))
            elif instance.load is not load:
                instance.refresh(load)
        if len(self._instances) > len(view.instances):
            for gone in self._instances.keys() - {seen.load.instance for seen in view.instances}:
                del self._instances[gone]
                self._prefixes.forget(gone)

    def _ask(self, request: Request) -> _Ask:
        chain = self._chain(request.prompt, request.tenant)
        size = self.settings.prefix_block_tokens
        # The last prompt token is always computed: the first draw needs its logits.
        most = len(request.prompt) - 1
        hits = self._prefixes.hits(chain)
        cached = {name: min(depth * size, most) for name, depth in hits.items()}
        return _Ask(request, chain, cached, self._room_tokens(request))

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
        prefill = next((one for one in prefills if one.load.role.prefills), None)
        decode = next((one for one in decodes if one.load.role.decodes), None)
        if prefill is None:
            return None if decode is None else self._route(ask, decode, None)
        return self._route(ask, prefill, None if prefill.load.role.decodes else decode)

    def _cheapest(self, ask: _Ask, usable: list[_Instance]) -> Route | None:
        """The lowest cost of mixed instances, a hand-off, and decode instances with slack."""
        target_s = ask.request.slo.ttft_s
        costs = [(self._decode_cost(ask, one), one) for one in usable if one.load.role.decodes]
        choices: list[_Choice] = [
            (cost + self._ttft_s(ask, one) / target_s, one, None)
            for cost, one in costs
            if one.load.role.prefills
        ]
        prefills = [(self._ttft_s(ask, one), one) for one in usable if not one.load.role.decodes]
        if costs and prefills:
            cost, decode = min(costs, key=_cost)
            ttft_s, prefill = min(prefills, key=_cost)
            cost += self.settings.handoff_s / ask.request.slo.tpot_s
            choices.append((cost + ttft_s / target_s, prefill, decode))
            choices += self._local(ask, costs, ttft_s * self.settings.local_ttft_share)
        choices = choices or self._alone(ask, usable)
        if not choices:
            return None
        _, first, partner = min(choices, key=_cost)
        return self._route(ask, first, partner)

    def _local(
        self, ask: _Ask, costs: list[tuple[float, _Instance]], below_s: float
    ) -> list[_Choice]:
        """Decode instances that would give a short prompt's first token sooner."""
        target_s = ask.request.slo.ttft_s
        local: list[_Choice] = []
        for cost, one in costs:
            if one.load.role is Role.DECODE and self._may_prefill_locally(ask, one):
                ttft_s = self._ttft_s(ask, one)
                if ttft_s < below_s:
                    local.append((cost + ttft_s / target_s, one, None))
        return local

    def _alone(self, ask: _Ask, usable: list[_Instance]) -> list[_Choice]:
        """While a whole role is missing, the other serves requests by itself."""
        return [(self._decode_cost(ask, one) + self._ttft_s(ask, one), one, None) for one in usable]

    def _decode_cost(self, ask: _Ask, instance: _Instance) -> float:
        pace = instance.tpot_s() / ask.request.slo.tpot_s
        missed = max(pace - 1.0, 0.0)
        return pace + 4.0 * missed + instance.crowding(ask.room_tokens)

    def _may_prefill_locally(self, ask: _Ask, instance: _Instance) -> bool:
        if ask.own_tokens(instance) > self.settings.local_prompt_tokens:
            return False
        return self._slack(ask, instance) >= self.settings.local_slack

    def _slack(self, ask: _Ask, instance: _Instance) -> float:
        return 1.0 - instance.tpot_s() / ask.request.slo.tpot_s

    def _ttft_s(self, ask: _Ask, instance: _Instance) -> float:
        seconds = self._seconds(instance, ask.work_tokens(instance))
        if instance.load.role is Role.DECODE:
            # Its prompt chunks ride in what the decode steps leave of the TPOT target.
            return seconds / max(self._slack(ask, instance), 0.01)
        return seconds

    def _seconds(self, instance: _Instance, tokens: int) -> float:
        speed = instance.speed if instance.speed.observations else self._typical
        return speed.at(tokens)

    def _route(self, ask: _Ask, prefill: _Instance, decode: _Instance | None) -> Route:
        return Route(
            prefill.name,
            None if decode is None else decode.name,
            ask.cached.get(prefill.name, 0),
            self._ttft_s(ask, prefill),
            ask.work_tokens(prefill),
            ask.chain,
        )


def _cost(choice: tuple[float, *tuple[object, ...]]) -> float:
    """Ties go to the first, and views are in order of id."""
    return choice[0]


def _rotated(instances: list[_Instance], turn: int) -> list[_Instance]:
    if not instances:
        return []
    first = turn % len(instances)
    return instances[first:] + instances[:first]
