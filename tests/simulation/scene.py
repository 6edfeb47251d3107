"""A world with a script instead of chance: named instances, chosen routes, and things that happen
at a chosen message, token or event."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from cluster.instance.instance import InstanceSettings
from decode.scheduler import DecodeSettings
from engine import wire
from engine.messages import Migrate, Migrated, Role
from engine.request import Request, Sampling
from engine.slo import Slo
from kvtransfer.transfer import TransferSettings
from placement.role import RoleSettings
from placement.routing.router import Route
from prefill.scheduler import PrefillSettings
from tests.simulation import faults as fault
from tests.simulation.model import prefix_cells
from tests.simulation.world import EVERYTHING_ENDS_S, GROUPS, LOAD_S, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.messages import Message

    Act = Callable[[], None]

DETECTED_S, AGAIN_S = 0.3, 0.6
STEP_S = 0.02


class Scene(World):
    def __init__(
        self,
        *names: str,
        blocks: dict[str, int] | None = None,
        decode: DecodeSettings | None = None,
        seed: int = 0,
        runs_ahead: bool = False,
    ) -> None:
        self._names, self._blocks = names, blocks or {}
        self._scripted_ahead = runs_ahead
        self._settings = InstanceSettings(
            RoleSettings(PrefillSettings(token_budget=16), decode or DecodeSettings()),
            TransferSettings(layer_groups=GROUPS, piece_bytes=0),
        )
        self._routes: dict[str, Route] = {}
        self._before: dict[type[Message], list[tuple[int, Act]]] = {}
        self._losing: Counter[type[Message]] = Counter()
        self._at_token: dict[tuple[str, int], Act] = {}
        self._at_event: dict[int, list[Act]] = {}
        self._lost_sends: set[int] = set()
        self._pending = self._failing_pulls = 0
        self.pull_block_s = 0.001
        self.copied: Counter[tuple[str, bytes]] = Counter()
        """Target and content of every copied block: what its last slot holds in the first layer."""
        self.asked: dict[str, Request] = {}
        self.sends = 0
        self.seen: Counter[str] = Counter()
        """Messages that reached somebody, by their kind."""
        self.ended: list[Migrated] = []
        self.delivered_s: dict[str, list[float]] = {}
        super().__init__(seed)
        self.block_tokens, self._step_s = 4, STEP_S

    # The script.

    def ask(
        self,
        name: str,
        route: Route,
        *,
        prompt: int = 14,
        tokens: int = 30,
        sibling_of: str = "",
        **more: int,
    ):
        """A client that comes at once; what is not said about the request is ordinary."""
        sampling = Sampling(max_tokens=tokens, seed=len(self._routes), ignore_eos=True)
        first = sum((sibling_of or name).encode())
        asked = tuple((first + 7 * n) % 63 + 1 for n in range(prompt))
        request = Request(name, asked, sampling, Slo(2.0, 0.2), arrival_s=self.now, **more)
        self._routes[name], self.asked[name] = route, request
        self.happen(0.05, lambda: self._submit(request))

    def happen(self, delay_s: float, act: Act) -> None:
        """Something that the scene does not end before."""
        self._pending += 1

        def done() -> None:
            self._pending -= 1
            act()

        self.after(delay_s, "script", done)

    def before(self, kind: type[Message], act: Act, nth: int = 1) -> None:
        """As the nth message of a kind is about to arrive."""
        self._before.setdefault(kind, []).append((nth, act))

    def at_token(self, request_id: str, index: int, act: Act) -> None:
        self._at_token[request_id, index] = act

    def at_event(self, number: int, act: Act) -> None:
        self._at_event.setdefault(number, []).append(act)

    def lose(self, kind: type[Message], times: int = 1) -> None:
        self._losing[kind] += times

    def lose_send(self, number: int) -> None:
        """The message of this number, of all that are sent, never arrives."""
        self._lost_sends.add(number)

    def poison(self, request_id: str) -> None:
        """Every batch with this request in it fails."""
        self._poison.add(request_id)

    def make_lethal(self, request_id: str) -> None:
        """Every batch with this request in it ends its instance."""
        self._lethal.add(request_id)

    def fail_pulls(self, count: int) -> None:
        self._failing_pulls = count

    def migrate(self, request_id: str, source: str, target: str) -> None:
        self._deliver("controller", source, wire.encode(Migrate(request_id, target, "balance")))

    def cancel(self, request_id: str) -> None:
        for gateway in self.gateways.values():
            gateway.cancel(request_id)

    def end(self, name: str, detected_s: float = DETECTED_S, again_s: float = AGAIN_S) -> None:
        """Kills an instance that may be dead already; the scene lasts until it is back."""
        if name in self.nodes:
            self.kill(name, detected_s, detected_s + again_s)
            self.happen(detected_s + again_s + LOAD_S, lambda: None)

    def play(self) -> Scene:
        """To the end of every request; then nothing is left anywhere."""
        while self._pending or self._busy():
            assert self.now < EVERYTHING_ENDS_S, self._unfinished()
            self._next_event()
            for act in self._at_event.pop(self.events, []):
                act()
        self.check_empty()
        return self

    def check_empty(self) -> None:
        for node in self.nodes.values():
            one = node.instance
            assert one.pool.counts().available == one.pool.total_blocks
            assert not one.load().sequences
            residents, transfers = one._residents, one._transfers
            assert not any((residents._gateways, residents.stamps, residents._doomed))
            assert not transfers.held
            assert (len(transfers._arrivals), len(transfers._departures)) == (0, 0)
        assert not any(len(gateway) for gateway in self.gateways.values())

    # What came of it.

    @property
    def finished(self) -> dict[str, int]:
        return next(iter(self.gateways.values())).finished

    @property
    def outcomes(self) -> list[str]:
        """How the migrations ended."""
        return [migrated.outcome for migrated in self.ended]

    def prompt_blocks_copied(self, target: str, request_id: str) -> int:
        """How often a full block of this prompt was brought to the target, by any request."""
        ends = prefix_cells(self.asked[request_id].prompt, layer=0)[self.block_tokens - 1 :]
        return sum(self.copied[target, cell] for cell in ends[:: self.block_tokens])

    def longest_gap_s(self, request_id: str) -> float:
        at = self.delivered_s[request_id]
        return max(b - a for a, b in pairwise(at))

    # Instead of chance.

    def _drawn_faults(self) -> fault.Faults:
        return fault.NONE

    def _drawn_runs_ahead(self) -> bool:
        return self._scripted_ahead

    def _drawn_gateways(self) -> int:
        return 1

    def _drawn_roles(self) -> dict[str, Role]:
        return {name: Role(name.partition("-")[0]) for name in self._names}

    def _drawn_settings(self) -> InstanceSettings:
        return self._settings

    def _drawn_blocks(self, name: str) -> int:
        return self._blocks.get(name, 32)

    def _pull_s(self, blocks: int) -> float:
        return 0.001 + self.pull_block_s * blocks

    def _pull_breaks(self) -> bool:
        self._failing_pulls -= 1
        return self._failing_pulls >= 0

    def _copy(self, node, source, order) -> None:
        super()._copy(node, source, order)
        if order.first_layer == 0:
            for block in order.target_blocks:
                content = node.model.memory[block, 0, self.block_tokens - 1]
                self.copied[node.instance.name, content] += 1

    def choose_route(self, request, ready: list[str]) -> Route:
        """The scripted one while its instances live, else whichever instance is ready."""
        route = self._routes[request.id]
        wanted = [route.prefill] if route.decode is None else [route.prefill, route.decode]
        return route if set(wanted) <= set(ready) else Route(sorted(ready)[0])

    def send(self, sender: str, to: str, message: Message) -> None:
        self.sends += 1
        if self.sends not in self._lost_sends:
            super().send(sender, to, message)

    def _deliver(self, sender: str, to: str, data: bytes) -> None:
        message = wire.decode(data)
        kind = type(message)
        if self._losing[kind] > 0:
            self._losing[kind] -= 1
            return
        self.seen[kind.__name__] += 1
        for nth, act in self._before.get(kind, []):
            if nth == self.seen[kind.__name__]:
                act()
        if isinstance(message, Migrated):
            self.ended.append(message)
        super()._deliver(sender, to, data)

    def delivered(self, request_id: str, index: int) -> None:
        self.delivered_s.setdefault(request_id, []).append(self.now)
        act = self._at_token.pop((request_id, index), None)
        if act is not None:
            self.happen(0.0, act)
