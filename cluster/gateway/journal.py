"""The gateway's record of its requests: who owns each one, and what of it was delivered.

A request has one owner at a time, known by its epoch. The next owner is granted beforehand, by
the route (prefill to decode) or by a Claim (migration), and becomes the owner with its first
delivered token. Whatever is lost, late or repeated, each token is delivered once and in order.

Verbs return what to do as data; `Reroute` asks the driver for a route and a `restart`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.gateway.entry import (
    Action,
    Deliver,
    Entry,
    Fail,
    Grant,
    JournalSettings,
    Reroute,
    Resumed,
    Send,
)
from engine import errors
from engine.blocks import blocks_for
from engine.errors import (
    BadInput,
    BatchFailed,
    DeadlineExceeded,
    InstanceLost,
    OutOfBlocks,
    PoisonRequest,
    TandemError,
    Unsupported,
)
from engine.messages import (
    Abort,
    Accepted,
    Claim,
    Dropped,
    InstanceState,
    Kept,
    Load,
    Lost,
    Message,
    Resume,
    Start,
    Token,
    Tokens,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.request import Request
    from placement.routing.router import Route


COMMITTED = "committed"
"""The state of a sequence that an instance holds only until its target is accepted."""
ARRIVING = frozenset(("offered", "reserved", "copying"))
"""States of a sequence whose KV is on its way to the instance that lists it."""


class Journal:
    """Driven by its host: no clock, no sockets, the same steps for the same calls."""

    def __init__(self, settings: JournalSettings | None = None) -> None:
        self.settings = settings or JournalSettings()
        self._entries: dict[str, Entry] = {}
        self._tombstones: dict[str, int] = {}
        self._heard_s: dict[str, float] = {}
        self._lost: dict[str, None] = {}
        self._leaving: dict[str, None] = {}
        """Instances that drain: no request brings them down."""
        self._pools: dict[str, tuple[int, int]] = {}
        """Each live instance's blocks, and tokens in a block."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def entries(self) -> Iterable[Entry]:
        """Requests under way in order of opening; read only."""
        return self._entries.values()

    def find(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def has_ended(self, request_id: str) -> bool:
        """Whether it was here lately and has ended."""
        return request_id in self._tombstones

    # What the driver does.

    def open(self, request: Request, route: Route, now: float) -> list[Action]:
        assert request.id not in self._entries, f"{request.id} is open"
        # An id that is used again goes on behind its former life, which instances have buried.
        epoch = self._tombstones.pop(request.id, 0) + 1
        self._entries[request.id] = Entry(request, epoch, stuck_since_s=now)
        return self.restart(request.id, route, now)

    def restart(self, request_id: str, route: Route, now: float) -> list[Action]:
        """Send an entry without an owner along a route, from its last delivered token on."""
        entry = self._entries[request_id]
        assert entry.owner is None, f"{request_id} is owned by {entry.owner}"
        entry.owner = entry.prefill = route.prefill
        entry.evidence_s = now
        start = Start(entry.request, entry.epoch, tuple(entry.output))
        if route.decode is not None:
            entry.grant = Grant(entry.epoch + 1, route.decode, claimed=False)
            start = Start(entry.request, entry.epoch, start.output, route.decode, entry.grant.epoch)
        return [Send(route.prefill, start)]

    def may_restart(self, request_id: str) -> bool:
        """Requests that several instances have died or failed under go one at a time: the one
        behind it must not take the others along."""
        patience = self.settings.progress_tokens
        if not self._entries[request_id].is_suspect(patience):
            return True
        others = (entry for entry in self._entries.values() if entry.id != request_id)
        return not any(entry.owner and entry.is_suspect(patience) for entry in others)

    def abort(self, request_id: str) -> list[Action]:
        """End a request early: its client left, or its text is complete."""
        entry = self._entries.get(request_id)
        return [] if entry is None else self._end(entry)

    def tick(self, now: float) -> list[Action]:
        """Find requests that nobody works on any more; call it a few times a second."""
        actions: list[Action] = []
        for entry in list(self._entries.values()):
            actions += self._check(entry, now)
        return actions

    # What instances say.

    def receive(self, sender: str, message: Message, now: float) -> list[Action]:
        match message:
            case Tokens(tokens):
                return [action for one in tokens for action in self.token(sender, one, now)]
            case Claim():
                return self.claim(sender, message)
            case Dropped():
                return self.dropped(sender, message, now)
            case Kept():
                return self.kept(sender, message)
            case Load():
                return self.load(message, now)
            case Lost(name):
                return self.lost(name, now)
            case _:
                return []

    def token(self, sender: str, token: Token, now: float) -> list[Action]:
        entry = self._entries.get(token.request_id)
        if entry is None or not entry.knows(token.epoch):
            return [Send(sender, Abort(token.request_id, token.epoch))]
        entry.evidence_s = now
        missing = token.index - len(entry.output)
        if missing < 0:
            return []
        if missing > 0:
            return self._hold(entry, token, now)
        actions: list[Action] = []
        self._deliver(entry, token, actions)
        if entry.early:
            self._deliver_early(entry, now, actions)
        return actions

    def claim(self, sender: str, claim: Claim) -> list[Action]:
        """Compare and swap: the target is granted iff the claimed epoch still owns."""
        entry = self._entries.get(claim.request_id)
        if entry is None:
            return [*_refuse(sender, claim), Send(sender, Abort(claim.request_id, claim.epoch))]
        wanted = Grant(claim.epoch, claim.target, claimed=True)
        owns = entry.owner == sender and entry.epoch == claim.old_epoch
        free = entry.grant is None and claim.epoch > entry.highest
        if owns and free and claim.target not in self._lost:
            entry.grant = wanted
        if owns:
            granted = entry.grant == wanted
            return [Send(sender, Verdict(entry.id, claim.epoch, granted))]
        if entry.claimed_from == claim.old_epoch and entry.epoch == claim.epoch:
            granted_before = Verdict(entry.id, claim.epoch, granted=True)
            return [Send(sender, granted_before), Send(sender, Accepted(entry.id, entry.epoch))]
        return [*_refuse(sender, claim), self._correct(entry, sender, claim.old_epoch)]

    def dropped(self, sender: str, dropped: Dropped, now: float) -> list[Action]:
        entry = self._entries.get(dropped.request_id)
        if entry is None or not entry.knows(dropped.epoch):
            return []
        if _is_final(dropped.error):
            return self._fail(entry, _error_of(dropped))
        why = f"{sender} dropped it: {dropped.error}: {dropped.reason}"
        if dropped.error == OutOfBlocks.__name__ and (error := self._too_large(entry)):
            return self._fail(entry, error)
        if dropped.error == BatchFailed.__name__ and self._crashed(entry):
            return self._fail(entry, self._poison(entry, why))
        if dropped.epoch == entry.epoch:
            return self._without_owner(entry, (sender,), why, now)
        return self._without_grant(entry, (sender,), why, now)

    def kept(self, sender: str, kept: Kept) -> list[Action]:
        """The owner goes on by itself: the grant of its route is void."""
        entry = self._entries.get(kept.request_id)
        if entry is None or entry.owner != sender or entry.epoch != kept.epoch:
            return []
        if entry.grant is None or entry.grant.claimed:
            return []
        grant, entry.grant = entry.grant, None
        entry.voided = grant.epoch
        return self._send_alive((grant.instance,), Abort(entry.id, grant.epoch))

    def load(self, load: Load, now: float) -> list[Action]:
        """Compare what an instance holds with what it should: the cure for lost messages."""
        self._heard_s[load.instance] = now
        self._pools[load.instance] = load.total_blocks, load.block_tokens
        self._lost.pop(load.instance, None)
        self._leaving.pop(load.instance, None)
        if load.state is InstanceState.DRAINING:
            self._leaving[load.instance] = None
        actions: list[Action] = []
        for running in load.sequences:
            entry = self._entries.get(running.request_id)
            if entry is None:
                if running.request_id in self._tombstones:
                    actions.append(Send(load.instance, Abort(running.request_id, running.epoch)))
            elif entry.knows(running.epoch):
                if running.state != COMMITTED:
                    entry.evidence_s = now
            elif running.state not in ARRIVING or running.epoch <= entry.highest:
                actions.append(self._correct(entry, load.instance, running.epoch))
        return actions

    def lost(self, name: str, now: float) -> list[Action]:
        self._lost[name] = None
        self._heard_s.pop(name, None)
        self._pools.pop(name, None)
        crashed = name not in self._leaving
        self._leaving.pop(name, None)
        actions: list[Action] = []
        for entry in list(self._entries.values()):
            why = f"{name} is lost"
            if crashed and name in entry.holders and self._crashed(entry):
                actions += self._fail(entry, self._poison(entry, why))
            elif entry.owner == name:
                actions += self._without_owner(entry, (name,), why, now)
            elif entry.grant is not None and entry.grant.instance == name:
                actions += self._without_grant(entry, (name,), why, now)
        return actions

    # Delivery.

    def _deliver(self, entry: Entry, token: Token, actions: list[Action]) -> None:
        if token.epoch != entry.epoch:
            self._promote(entry, actions)
        entry.output.append(token.token)
        entry.replays = 0
        entry.resumed_from = None
        actions.append(Deliver(token))
        if token.finish is not None:
            self._bury(entry)
            if entry.grant is not None:
                actions.append(Send(entry.grant.instance, Abort(entry.id, entry.grant.epoch)))

    def _promote(self, entry: Entry, actions: list[Action]) -> None:
        """The granted instance becomes the owner; the one before it may free its blocks."""
        grant = entry.grant
        assert grant is not None
        if entry.owner is not None and entry.owner not in self._lost:
            actions.append(Send(entry.owner, Accepted(entry.id, grant.epoch)))
        entry.claimed_from = entry.epoch if grant.claimed else None
        entry.migrations += grant.claimed
        entry.epoch, entry.owner, entry.grant = grant.epoch, grant.instance, None

    def _hold(self, entry: Entry, token: Token, now: float) -> list[Action]:
        if not entry.early:
            entry.stuck_since_s = now
        entry.early[token.index] = token
        if len(entry.early) > self.settings.early_tokens:
            return self._replay(entry, (), "too many tokens arrived before a missing one", now)
        return []

    def _deliver_early(self, entry: Entry, now: float, actions: list[Action]) -> None:
        entry.stuck_since_s = now
        while entry.id in self._entries:
            token = entry.early.pop(len(entry.output), None)
            if token is None or not entry.knows(token.epoch):
                return
            self._deliver(entry, token, actions)

    # Recovery.

    def _check(self, entry: Entry, now: float) -> list[Action]:
        settings = self.settings
        if entry.owner is None:
            if not self.may_restart(entry.id):
                entry.stuck_since_s = now
            if now - entry.stuck_since_s > settings.reroute_s:
                return self._fail(entry, DeadlineExceeded("no instance could take the request"))
            return []
        if entry.early and now - entry.stuck_since_s > settings.gap_s:
            return self._replay(entry, (), "a token never arrived", now)
        heard_s = self._heard_s.get(entry.owner, entry.evidence_s)
        if entry.owner in self._lost or heard_s - entry.evidence_s > settings.vanish_s:
            why = f"{entry.owner} does not know the request"
            return self._without_owner(entry, (entry.owner,), why, now)
        return []

    def _without_owner(
        self, entry: Entry, avoid: tuple[str, ...], why: str, now: float
    ) -> list[Action]:
        """A claimed target has all it needs without its source; anything else is replayed."""
        if entry.grant is not None and entry.grant.claimed:
            actions: list[Action] = []
            self._promote(entry, actions)
            entry.evidence_s = now
            return actions
        return self._replay(entry, avoid, why, now)

    def _without_grant(
        self, entry: Entry, avoid: tuple[str, ...], why: str, now: float
    ) -> list[Action]:
        """A migration's source goes on under a new epoch; a hand-off is replayed."""
        grant = entry.grant
        assert grant is not None
        if not grant.claimed or entry.owner is None:
            return self._replay(entry, avoid, why, now)
        entry.resumed_from = entry.epoch
        entry.epoch, entry.grant = grant.epoch + 1, None
        entry.early.clear()
        entry.evidence_s = now
        resume = Send(entry.owner, Resume(entry.id, entry.resumed_from, entry.epoch))
        resumed = Resumed(entry.id, entry.owner)
        return [resumed, resume, *self._send_alive((grant.instance,), Abort(entry.id, grant.epoch))]

    def _replay(self, entry: Entry, avoid: tuple[str, ...], why: str, now: float) -> list[Action]:
        """Take the request from whoever holds it and ask for a route to compute it again."""
        entry.replays += 1
        entry.replays_total += 1
        if entry.replays > self.settings.replays:
            return self._fail(entry, InstanceLost(f"given up after {self._attempts()}: {why}"))
        actions = self._send_alive(entry.holders, Abort(entry.id, entry.highest))
        entry.epoch = entry.highest + 1
        entry.owner = entry.grant = entry.resumed_from = entry.claimed_from = None
        entry.early.clear()
        entry.stuck_since_s = now
        return [*actions, Reroute(entry.id, avoid, why)]

    def _attempts(self) -> str:
        return f"{self.settings.replays} replays"

    def _crashed(self, entry: Entry) -> bool:
        """Counts a crash under the request; whether it has had too many."""
        entry.count_crash(self.settings.progress_tokens)
        return entry.crashes >= self.settings.crashes

    def _poison(self, entry: Entry, why: str) -> PoisonRequest:
        return PoisonRequest(f"{entry.id} brought down {entry.crashes} attempts in a row: {why}")

    def _too_large(self, entry: Entry) -> OutOfBlocks | None:
        """The error of a request that no pool could hold; None if one might, or none is known."""
        sizes = [
            (total, blocks_for(entry.needed_tokens, block_tokens))
            for total, block_tokens in self._pools.values()
        ]
        if not sizes or any(wanted <= total for total, wanted in sizes):
            return None
        total, wanted = max(sizes)
        return OutOfBlocks(wanted, total)

    def _correct(self, entry: Entry, instance: str, epoch: int) -> Action:
        """What to tell an instance that believes in an epoch that has been replaced."""
        if entry.owner == instance and epoch == entry.resumed_from:
            return Send(instance, Resume(entry.id, epoch, entry.epoch))
        if epoch == entry.claimed_from:
            return Send(instance, Accepted(entry.id, entry.epoch))
        return Send(instance, Abort(entry.id, epoch))

    def _fail(self, entry: Entry, error: TandemError) -> list[Action]:
        return [*self._end(entry), Fail(entry.id, error)]

    def _end(self, entry: Entry) -> list[Action]:
        self._bury(entry)
        return self._send_alive(entry.holders, Abort(entry.id, entry.highest))

    def _bury(self, entry: Entry) -> None:
        del self._entries[entry.id]
        self._tombstones[entry.id] = entry.highest
        while len(self._tombstones) > self.settings.tombstones:
            del self._tombstones[next(iter(self._tombstones))]

    def _send_alive(self, instances: Iterable[str], message: Message) -> list[Action]:
        return [Send(name, message) for name in instances if name not in self._lost]


def _refuse(sender: str, claim: Claim) -> list[Action]:
    return [Send(sender, Verdict(claim.request_id, claim.epoch, granted=False))]


def _is_final(error: str) -> bool:
    """Whether trying elsewhere is pointless."""
    kind = getattr(errors, error, None)
    return isinstance(kind, type) and issubclass(kind, (BadInput, Unsupported))


def _error_of(dropped: Dropped) -> TandemError:
    if dropped.error == Unsupported.__name__:
        return Unsupported(dropped.reason)
    return errors.BadRequest("request", dropped.request_id, dropped.reason)
