"""The one path of a request, whichever door it came through.

validate -> tokenize -> admit -> route -> journal -> tokens -> deltas of text. The gateway that
holds the client's stream owns the request; instances send their tokens straight to it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.gateway.entry import Deliver, Fail, Reroute, Resumed, Send
from cluster.gateway.intake import Intake
from cluster.gateway.journal import Journal
from cluster.gateway.peers import Everywhere, Peers
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.telling import ended, opened
from cluster.gateway.view import RequestStatus, Sightings, status_of
from cluster.watching.observer import Observers, Rerouted
from engine.errors import BadRequest, DeadlineExceeded, InstanceLost, NotFound, Overloaded
from engine.messages import Dropped, Load, Lost, Migrated, Query, Reply, Tokens
from engine.request import FinishReason
from placement.routing.admission import Admission, Forecast
from placement.routing.router import Router

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cluster.gateway.answer import Answer, Choice
    from cluster.gateway.call import Call
    from cluster.gateway.entry import Action
    from cluster.gateway.intake import GrammarCheck
    from cluster.links import Link
    from engine.clock import Clock
    from engine.errors import TandemError
    from engine.messages import Message, Token
    from engine.request import Request
    from engine.tokenizer import Tokenizer
    from placement.routing.router import Route

LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Pending:
    """A request of the journal that waits for a route."""

    avoid: tuple[str, ...]
    why: str


class Gateway:
    """Owns its link, its journal and every client's answer; lives on one event loop."""

    def __init__(
        self,
        link: Link,
        tokenizer: Tokenizer,
        clock: Clock,
        *,
        model: str,
        context_tokens: int,
        settings: GatewaySettings | None = None,
        grammars: GrammarCheck | None = None,
        observers: Observers | None = None,
    ) -> None:
        self.settings = settings or GatewaySettings()
        self.link, self.tokenizer, self.clock, self.model = link, tokenizer, clock, model
        self.observers = observers or Observers()
        self.intake = Intake(
            tokenizer,
            self.settings.limits,
            context_tokens=context_tokens,
            slo=self.settings.slo,
            grammars=grammars,
        )
        self.draining = False
        self._journal = Journal(self.settings.journal)
        self._router = Router(self.settings.routing)
        self._admission = Admission(self.settings.admission)
        self._sightings = Sightings()
        self._choices: dict[str, Choice] = {}
        self._traces: dict[str, str] = {}
        self._answers: dict[str, Answer] = {}
        self._pending: dict[str, _Pending] = {}
        self._changed = asyncio.Event()
        self.peers = Peers(link)
        self.everywhere = Everywhere(self, self.peers)

    # For the doors.

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be served."""
        view = self._sightings.view(self.clock.now())
        return not self.draining and any(one.takes_requests for one in view.instances)

    async def open(self, call: Call) -> Answer:
        """Admit a call; its deltas come from `Answer.next`, and `close` must follow.

        Raises BadRequest, or Overloaded when it is refused now.
        """
        self._check_open()
        answer = await self.intake.answer(call, self.clock.now())
        self._check_open()
        if answer.id in self._answers:
            raise BadRequest("request_id", answer.id, "is under way already")
        if call.request_id is not None:
            self._check_elsewhere(answer)
        for choice in answer.choices:
            self._sightings.check_prompt(len(choice.request.prompt), self.clock.now())
        self._submit(answer, strict=call.targets.ttft_s is not None)
        if call.trace is not None:
            self._traces[answer.id] = call.trace
        self._dispatch()
        return answer

    def close(self, answer: Answer) -> None:
        """The reader is gone or has read everything: whatever still runs is aborted."""
        for choice in answer.choices:
            if choice.request.id in self._choices:
                self._abort(choice, FinishReason.ABORT)
        self._answers.pop(answer.id, None)
        self._traces.pop(answer.id, None)

    def abort(self, request_id: str, tenant: str | None = None) -> None:
        """End a call for another client; `tenant` restricts whose. Raises NotFound."""
        answer = self._answers.get(request_id)
        if answer is None or (tenant is not None and answer.tenant != tenant):
            raise NotFound(f"request {request_id!r} is not under way")
        for choice in answer.choices:
            if choice.request.id in self._choices:
                self._abort(choice, FinishReason.ABORT)
                choice.end(FinishReason.ABORT)

    def _check_open(self) -> None:
        if self.draining:
            raise Overloaded("the server is shutting down", 5.0)

    def _check_elsewhere(self, answer: Answer) -> None:
        """A caller's own request id must not be that of another gateway's request."""
        for choice in answer.choices:
            name = choice.request.id
            if self._sightings.lists(name) and not self._journal.has_ended(name):
                raise BadRequest("request_id", answer.id, "is under way at another gateway")

    def requests(self) -> list[RequestStatus]:
        """Every request whose client is here, in order of arrival."""
        return [status_of(choice) for choice in self._choices.values()]

    def waiting(self) -> list[Request]:
        """Those of them that have not been sent anywhere yet."""
        return [one.request for one in self._choices.values() if one.entry is None]

    def loads(self) -> list[Load]:
        """The instances' latest loads, in order of id."""
        return [one.load for one in self._sightings.view(self.clock.now()).instances]

    async def drain(self, within_s: float) -> None:
        """Admit nothing more and wait for what is under way; what takes longer fails."""
        self.draining = True
        try:
            async with asyncio.timeout(within_s):
                await self._until_all_have_ended()
        except TimeoutError:
            LOG.warning("drain incomplete requests=%d", len(self._choices))
            self._give_up_all(DeadlineExceeded(f"not done {within_s:g} s after a shutdown began"))

    async def _until_all_have_ended(self) -> None:
        while self._choices:
            self._changed.clear()
            await self._changed.wait()

    # The loops.

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive())
            tasks.create_task(self._sweep())

    async def _receive(self) -> None:
        while True:
            sender, message = await self.link.receive()
            self.receive(sender, message)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.settings.sweep_s)
            self.sweep()

    def receive(self, sender: str, message: Message) -> None:
        now = self.clock.now()
        match message:
            case Tokens(tokens):
                self._tokens(sender, tokens, now)
            case Load():
                self._load(message, now)
            case Lost(name):
                self._lost(name, now)
            case Dropped():
                self._note_failed_handoff(message, now)
                self._act(self._journal.dropped(sender, message, now), now)
            case Migrated():
                self.observers.migrated(message, now)
            case Query():
                self.peers.asked(sender, message)
            case Reply():
                self.peers.answered(message)
            case _:
                self._act(self._journal.receive(sender, message, now), now)

    def joined(self, name: str, node: str = "") -> None:
        """An instance has come, perhaps under the name of one that was lost; `node` tells where
        its stages lie."""
        self._sightings.joined(name, node)

    def _load(self, load: Load, now: float) -> None:
        if not self._sightings.heard(load, now):
            return
        self.observers.loaded(load, now)
        self._act(self._journal.load(load, now), now)
        self._dispatch()

    def sweep(self) -> None:
        now = self.clock.now()
        self._act(self._journal.tick(now), now)
        for choice in list(self._choices.values()):
            self._charge(choice)
            if choice.request.id in self._choices:
                self._check_time(choice, now)
        self._dispatch()

    def _charge(self, choice: Choice) -> None:
        """Let the tenant's share pay for the tokens since the last time."""
        new = choice.output_tokens - choice.charged_tokens
        if new:
            self._admission.charge(choice.request.tenant, new)
            choice.charged_tokens = choice.output_tokens

    # Admission and routing.

    def _submit(self, answer: Answer, *, strict: bool) -> None:
        """All of an answer's requests or none."""
        submitted: list[Choice] = []
        try:
            for choice in answer.choices:
                forecast = self._forecast(choice.request)
                self._admission.submit(choice.request, forecast, strict=strict)
                submitted.append(choice)
        except Overloaded as error:
            for choice in submitted:
                self._admission.ended(choice.request.id)
            for choice in answer.choices:
                self._tell_ended(choice, "refused", error, self.clock.now())
            raise
        self._answers[answer.id] = answer
        for choice in answer.choices:
            self._choices[choice.request.id] = choice

    def _forecast(self, request: Request) -> Forecast | None:
        """None while too little has been seen to predict anything."""
        if not self._router.measured:
            return None
        route = self._router.choose(request, self._sightings.view(self.clock.now()))
        if route is None:
            return None
        alone_s = self._router.alone_s(route, len(request.prompt))
        queue_s = self._router.queue_s(self._admission.waiting_tokens)
        return Forecast(route.ttft_s + queue_s, alone_s)

    def _dispatch(self) -> None:
        """Send what may go, as far as instances can take it."""
        if not (self._admission.waiting_requests or self._pending):
            return
        now = self.clock.now()
        for request_id in list(self._pending):
            self._restart(request_id, now)
        view = self._sightings.view(now)
        takers = [one for one in view.instances if one.takes_requests]
        prefilling = sum(one.role.prefills for one in takers) or min(len(takers), 1)
        while (request := self._admission.next(prefilling)) is not None:
            route = self._router.choose(request, view, self._unfit(request, now))
            assert route is not None, "there are instances that take requests"
            self._start(self._choices[request.id], route, now)

    def _unfit(self, request: Request, now: float) -> tuple[str, ...]:
        """Instances that do not show themselves, or have too small a pool."""
        silent = self._sightings.silent_since(now - self.settings.silence_s)
        return silent + self._sightings.too_small(len(request.prompt) + 1, now)

    def _start(self, choice: Choice, route: Route, now: float) -> None:
        request = choice.request
        self._router.dispatched(request, route, now)
        trace = self._traces.get(choice.answer.id)
        self.observers.opened(opened(choice, route, trace, now))
        actions = self._journal.open(request, route, now)
        choice.entry = self._journal.find(request.id)
        self._act(actions, now)

    def _restart(self, request_id: str, now: float) -> None:
        """Send a request that lost its owner along a new route, if there is one."""
        choice, pending = self._choices[request_id], self._pending[request_id]
        entry = self._journal.find(request_id)
        assert entry is not None
        if not self._journal.may_restart(request_id):
            return
        whole = replace(choice.request, prompt=(*choice.request.prompt, *entry.output))
        avoid = (*pending.avoid, *self._unfit(whole, now))
        route = self._router.choose(whole, self._sightings.view(now), avoid)
        if route is None:
            return
        del self._pending[request_id]
        self._router.dispatched(whole, route, now)
        LOG.warning("request replayed request=%s why=%s", request_id, pending.why)
        self.observers.rerouted(
            Rerouted(request_id, now, route.prefill, route.decode, "replayed", pending.why)
        )
        self._act(self._journal.restart(request_id, route, now), now)

    # What the journal wants done.

    def _tokens(self, sender: str, tokens: Sequence[Token], now: float) -> None:
        gaps_s: list[float] = []
        for token in tokens:
            for action in self._journal.token(sender, token, now):
                if type(action) is Deliver:
                    self._deliver(action.token, now, gaps_s)
                else:
                    self._act((action,), now)
        if gaps_s:
            self.observers.streamed(gaps_s)

    def _act(self, actions: Iterable[Action], now: float) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    self._send(to, message, now)
                case Deliver(token):
                    self._deliver(token, now, [])
                case Reroute(request_id, avoid, why) if request_id in self._choices:
                    self._pending[request_id] = _Pending(avoid, why)
                    self._restart(request_id, now)
                case Resumed(request_id, owner):
                    why = "the migration's target was lost"
                    self.observers.rerouted(Rerouted(request_id, now, owner, None, "resumed", why))
                case Fail(request_id, error) if request_id in self._choices:
                    self._fail(self._choices[request_id], error, now)
                case Reroute() | Fail():
                    pass  # Its call has just ended with another of its answers.

    def _send(self, to: str, message: Message, now: float) -> None:
        try:
            self.link.send(to, message)
        except InstanceLost as error:
            LOG.warning("send failed to=%s error=%s", to, error)
            asyncio.get_running_loop().call_soon(self._lost, to, now)

    def _deliver(self, token: Token, now: float, gaps_s: list[float]) -> None:
        choice = self._choices.get(token.request_id)
        if choice is None:
            # A stop string in the token before, which the same message carried, ended it.
            return
        first = choice.output_tokens == 0
        if not first:
            gaps_s.append(now - choice.last_s)
        finish = choice.push(token, now)
        if first:
            self._admission.prefilled(token.request_id)
            self._router.prefilled(token.request_id, now)
        if finish is not None:
            if token.finish is None:
                self._act(self._journal.abort(token.request_id), now)
            self._ended(choice, finish.value, None, now)
        if first:
            self._dispatch()

    # Ends.

    def _ended(self, choice: Choice, outcome: str, error: TandemError | None, now: float) -> None:
        """Forget a request that the journal has closed, and tell whoever watches."""
        request = choice.request
        del self._choices[request.id]
        self._pending.pop(request.id, None)
        self._charge(choice)
        self._admission.ended(request.id)
        output = [] if choice.entry is None else choice.entry.output
        self._router.ended(request.id, (*request.prompt, *output), request.tenant)
        choice.timeline.finished_s = now
        self._tell_ended(choice, outcome, error, now)
        self._changed.set()

    def _tell_ended(
        self, choice: Choice, outcome: str, error: TandemError | None, now: float
    ) -> None:
        choice.timeline.finished_s = now
        self.observers.ended(ended(choice, outcome, error))

    def _abort(self, choice: Choice, finish: FinishReason) -> None:
        now = self.clock.now()
        self._act(self._journal.abort(choice.request.id), now)
        self._ended(choice, finish.value, None, now)

    def _fail(self, choice: Choice, error: TandemError, now: float) -> None:
        """One answer that cannot be given ends the whole call."""
        LOG.error("request failed request=%s error=%s", choice.request.id, error)
        self._ended(choice, FinishReason.ERROR.value, error, now)
        choice.answer.fail(error)
        for other in choice.answer.choices:
            if other.request.id in self._choices:
                self._abort(other, FinishReason.ABORT)

    def _lost(self, name: str, now: float) -> None:
        if self._sightings.lost(name):
            LOG.warning("instance lost instance=%s", name)
            self.observers.lost(name, now)
        self._act(self._journal.lost(name, now), now)

    def _note_failed_handoff(self, dropped: Dropped, now: float) -> None:
        entry = self._journal.find(dropped.request_id)
        if dropped.handoff and entry is not None and entry.knows(dropped.epoch):
            self.observers.handoff_failed(dropped.request_id, dropped.error, now)

    def _check_time(self, choice: Choice, now: float) -> None:
        request, settings = choice.request, self.settings
        if now - request.arrival_s > settings.request_s:
            error: TandemError = DeadlineExceeded(f"not done within {settings.request_s:g} s")
        elif choice.entry is None and now - request.arrival_s > settings.queue_s:
            error = Overloaded(f"no room within {settings.queue_s:g} s", 1.0)
        else:
            return
        self._give_up(choice, error, now)

    def _give_up(self, choice: Choice, error: TandemError, now: float) -> None:
        self._act(self._journal.abort(choice.request.id), now)
        self._fail(choice, error, now)

    def _give_up_all(self, error: TandemError) -> None:
        now = self.clock.now()
        for choice in list(self._choices.values()):
            if choice.request.id in self._choices:
                self._give_up(choice, error, now)
