"""A gateway's process: the gateway, its doors, its link, and its place in the roster."""

from __future__ import annotations

import asyncio
import logging
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.actors import ControllerSync
from cluster.gateway import Gateway
from cluster.membership import Membership
from cluster.roster import CONTROLLER, Kind, Member, Roster
from cluster.settings import gateway_settings
from cluster.zmq_link import ZmqLink
from engine.clock import SystemClock
from engine.messages import Lost

if TYPE_CHECKING:
    from cluster.config import Config
    from cluster.leading import Network
    from engine.grammar import GrammarCompiler
    from engine.tokenizer import Tokenizer

log = logging.getLogger(__name__)

GATEWAY_NAME = "gateway-0"


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
    return Model(config.served_name, checkpoint.max_length, tokenizer, GrammarCompiler(tokenizer))


class Front:
    """Must be made on the event loop that it runs on."""

    def __init__(self, config: Config, network: Network, model: Model, controller: Any) -> None:
        self._config, self._model, self._controller = config, model, controller
        self._link = ZmqLink(
            GATEWAY_NAME, network.bind(GATEWAY_NAME), network.key, config.limits.links
        )
        self._clock = SystemClock()
        self.gateway = Gateway(
            self._link,
            model.tokenizer,
            self._clock,
            model=model.name,
            context_tokens=model.context_tokens,
            settings=gateway_settings(config),
            grammars=model.grammars,
        )
        me = Member(GATEWAY_NAME, Kind.GATEWAY, uuid.uuid4().hex, self._link.address)
        self.membership = Membership(me, self._link, self, ControllerSync())

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.gateway.run())
            tasks.create_task(self.membership.run())

    def ready(self) -> bool:
        """Whether every instance that was asked for takes requests."""
        wanted = {spec.name for spec in self.membership.roster.desired}
        seen = {load.instance for load in self.gateway.loads()}
        return bool(wanted) and wanted <= seen and self.gateway.ready

    async def drain(self, within_s: float) -> None:
        """Admits nothing more and waits for what is under way, within a limit."""
        try:
            async with asyncio.timeout(within_s):
                await self.gateway.drain()
        except TimeoutError:
            log.warning("drain incomplete requests=%d", len(self.gateway.requests()))

    # Following the roster.

    async def joined(self, member: Member) -> None:
        log.info("member joined member=%s", member.name)

    def lost(self, member: Member) -> None:
        self.gateway.receive(CONTROLLER, Lost(member.name))

    def updated(self, roster: Roster) -> None:
        """The gateway learns of instances from their loads."""
