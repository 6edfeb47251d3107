"""A gateway's process: the gateway, its doors, its link, and its place in the roster."""

from __future__ import annotations

import asyncio
import logging
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.actors import ControllerSync
from cluster.control.policy_source import PolicySource
from cluster.doors.both import HttpServer, host_in_url
from cluster.doors.grpc_door import GrpcDoor
from cluster.doors.http import HttpDoor, HttpSettings
from cluster.doors.keys import Keyring
from cluster.gateway.gateway import Gateway
from cluster.gateway.operate import ClusterOperator, ask
from cluster.membership import Membership
from cluster.roster import CONTROLLER, Kind, Member, Roster
from cluster.settings import gateway_settings
from cluster.watching.everything import Watching
from cluster.watching.observer import Observers
from cluster.watching.reporter import Reporter
from cluster.watching.usage import UsageReporter
from cluster.zmq_link import ZmqLink
from engine.clock import SystemClock
from engine.messages import InstanceState, Lost

if TYPE_CHECKING:
    from cluster.config import Config
    from cluster.control.policy_source import PolicyText
    from cluster.instance.leading import Network
    from cluster.watching.observer import Observer
    from engine.grammar import GrammarCompiler
    from engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)

TALLY_S = 1.0
"""How often the other gateways are asked what they have counted."""
LAST_ANSWERS_S = 5.0
"""How long open calls may take over their last bytes when the doors close."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a gateway needs of a checkpoint: its texts, not its weights."""

    name: str
    context_tokens: int
    tokenizer: Tokenizer
    grammars: GrammarCompiler


def read_model(config: Config) -> Future[Model]:
    """Reads it meanwhile: libraries and files take a second that Ray's start can hide."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="model")
    reading = pool.submit(_read_model, config)
    pool.shutdown(wait=False)
    return reading


def _read_model(config: Config) -> Model:
    from engine.checkpoint import open_checkpoint
    from engine.grammar import GrammarCompiler
    from engine.tokenizer import Tokenizer

    checkpoint = open_checkpoint(config.model, config.engine.max_length)
    tokenizer = Tokenizer.open(checkpoint.directory, checkpoint.config.vocab)
    grammars = GrammarCompiler(tokenizer)
    return Model(config.served_name, checkpoint.max_length, tokenizer, grammars)


def gateway_name(number: int) -> str:
    return f"gateway-{number}"


class Front:
    """Must be made on the event loop that it runs on."""

    def __init__(
        self, config: Config, network: Network, model: Model, controller: Any, number: int = 0
    ) -> None:
        self._config, self._doors = config, config.gateway.numbered(number)
        self.name = gateway_name(number)
        self._clock = SystemClock()
        self._watching = Watching(config, self._clock)
        self._link = ZmqLink(self.name, network.bind(self.name), network.key, config.limits.links)
        self._controller = controller
        # The file lies beside the first gateway; others may run on nodes that do not have it.
        path = config.autoscaling.policy if number == 0 else None
        reporter = Reporter(controller)
        self.policy = PolicySource(path, self._apply_policy, reporter.tell, self._clock)
        self.usage = UsageReporter(self.name, controller)
        reporters: list[Observer] = [reporter, self.usage]
        self.gateway = Gateway(
            self._link,
            model.tokenizer,
            self._clock,
            model=model.name,
            context_tokens=model.context_tokens,
            settings=gateway_settings(config),
            grammars=model.grammars,
            observers=Observers([*self._watching.observers(), *reporters]),
        )
        me = Member(self.name, Kind.GATEWAY, uuid.uuid4().hex, self._link.address)
        sync = ControllerSync(config.limits.controller_s)
        self.membership = Membership(me, self._link, self, sync)
        self.gateway.peers.answer("tally", self._watching.metrics.document)
        self.whole = self._watching.whole(self.gateway)
        self._make_doors(ClusterOperator(self, controller))

    def _make_doors(self, operator: ClusterOperator) -> None:
        gateway = self._doors
        path = gateway.api_keys_file
        keys = None if path is None else Keyring(path, self._clock.now())
        door = HttpDoor(
            self.gateway,
            HttpSettings(gateway.http, model_root=self._config.model),
            keys=keys,
            metrics=self._watching.metrics.page,
            extra=self._watching.routes(self.whole, keys),
        )
        self._http = HttpServer(door.app, gateway)
        self._grpc = GrpcDoor(
            self.gateway,
            operator,
            host=gateway.host,
            port=gateway.grpc_port,
            keys=keys,
            tls=gateway.tls,
            limits=gateway.grpc,
        )
        self.http_url = self._http.url
        self.grpc_address = f"{host_in_url(gateway.host)}:{self._grpc.port}"
        self.drain_s = self._config.limits.drain_s + LAST_ANSWERS_S

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.gateway.run())
            tasks.create_task(self.membership.run())
            tasks.create_task(self.usage.run(self._waiting_requests, lambda: self.policy.latest))
            tasks.create_task(self.policy.follow())
            tasks.create_task(self._gather_tallies())

    async def _gather_tallies(self) -> None:
        metrics = self._watching.metrics
        while True:
            answers = await self.gateway.peers.ask("tally", metrics.known_lives())
            metrics.others.heard(answers.values())
            await asyncio.sleep(TALLY_S)

    async def _apply_policy(self, policy: PolicyText) -> list[str]:
        changes: list[str] = await ask(self._controller.apply_policy.remote(policy))
        return changes

    def _waiting_requests(self) -> int:
        return len(self.gateway.waiting())

    def ready(self) -> bool:
        """Whether every instance that was asked for takes requests."""
        wanted = {spec.name for spec in self.membership.roster.desired}
        loads = self.gateway.loads()
        seen = {load.instance for load in loads if load.state is InstanceState.READY}
        return bool(wanted) and wanted <= seen

    def config_document(self) -> dict[str, Any]:
        """What is in force; of secrets it has only the files' paths."""
        return self._config.model_dump(mode="json")

    def slo_document(self) -> dict[str, float | None]:
        slo = self._config.slo
        return {
            "ttft_s": slo.ttft_s,
            "tpot_s": slo.tpot_s,
            "attainment": self._watching.metrics.attainment(),
            "window_s": self._watching.slo.window_s,
        }

    async def open_doors(self) -> None:
        await self._http.open()
        await self._grpc.start()
        await self._grpc.set_ready(ready=True)

    async def drain(self) -> None:
        """Admits nothing more and waits for what is under way; what takes too long fails."""
        await self._grpc.set_ready(ready=False)
        await self.gateway.drain(self._config.limits.drain_s)

    async def close(self) -> None:
        await self._grpc.stop(LAST_ANSWERS_S)
        await self._http.close()
        await asyncio.to_thread(self._watching.close)
        self._link.close()

    # Following the roster.

    async def joined(self, member: Member) -> None:
        log.info("member joined member=%s", member.name)
        self.gateway.joined(member.name, member.stage_nodes)

    def lost(self, member: Member) -> None:
        self.gateway.receive(CONTROLLER, Lost(member.name))

    def updated(self, roster: Roster) -> None:
        """Of instances the gateway learns from their loads."""
        self.gateway.peers.follow(tuple(one.name for one in roster.of_kind(Kind.GATEWAY)))
