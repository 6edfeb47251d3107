"""A gateway and fake instances on one event loop: a whole cluster without Ray or torch."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cluster.gateway.gateway import Gateway
from cluster.gateway.settings import GatewaySettings
from cluster.links import LocalNetwork
from cluster.watching.observer import Observers
from engine.clock import SystemClock
from engine.messages import Lost, Role
from engine.tokenizer import Tokenizer
from tests.cluster.fakes import EchoInstance, hash_token

PATIENCE_S = 600.0
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and `</s>` as token 256."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    with TemporaryDirectory() as folder:
        path = Path(folder)
        backend.save(str(path / "tokenizer.json"))
        config = {"eos_token": "</s>", "chat_template": CHAT}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer.open(path)


TOKENIZER = byte_tokenizer()


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def says(text: str):
    """A draw that answers with this text and then the end."""
    tokens = [*tokens_of(text), 256]
    return lambda request, index: tokens[min(index, len(tokens) - 1)]


class FakeCluster:
    """Drives its instances as fast as the loop turns; `paused` ones draw nothing."""

    def __init__(
        self,
        names,
        *,
        draw=hash_token,
        settings=None,
        observers=(),
        grammars=None,
        context_tokens=2048,
        gateways=1,
    ) -> None:
        self.network = LocalNetwork()
        self.instances = {
            name: EchoInstance(name, Role(name.split("-")[0]), draw, eos=256) for name in names
        }
        self.links = {name: self.network.join(name) for name in names}
        names = tuple(f"gateway-{number}" for number in range(gateways))
        self.gateways = {
            name: Gateway(
                self.network.join(name),
                TOKENIZER,
                SystemClock(),
                model="fake",
                context_tokens=context_tokens,
                # The fakes tell their load once, so their silence means nothing.
                settings=replace(settings or GatewaySettings(sweep_s=0.01), silence_s=PATIENCE_S),
                observers=Observers(observers),
                grammars=grammars,
            )
            for name in names
        }
        self.gateway = self.gateways["gateway-0"]
        for gateway in self.gateways.values():
            gateway.peers.follow(names)
        self.paused: set[str] = set()
        self.tell_loads()

    def tell_loads(self) -> None:
        for name, link in self.links.items():
            for gateway in self.gateways:
                link.send(gateway, self.instances[name].load())

    async def host(self, name: str) -> None:
        instance, link = self.instances[name], self.links[name]
        inbox = self.network.inbox(name)
        while True:
            if inbox.empty() and (name in self.paused or not instance.sequences):
                self.receive(name, *await link.receive())
            while not inbox.empty():
                self.receive(name, *inbox.get_nowait())
            if name not in self.paused:
                instance.step()
            self.flush(name)
            await asyncio.sleep(0)

    def receive(self, name, sender, message) -> None:
        if message is not None:
            self.instances[name].receive(sender, message)

    def resume(self, name: str) -> None:
        self.paused.discard(name)
        self.links[name].send(name, None)

    def flush(self, name: str) -> None:
        for to, message in self.instances[name].take_outbox():
            if to in self.gateways or to in self.links:
                self.links[name].send(to, message)

    def kill(self, name: str) -> None:
        self.network.kill(name)
        self.links.pop(name)
        for gateway in self.gateways.values():
            gateway.receive("controller", Lost(name))

    def tell(self, name: str, message) -> None:
        self.instances[name].receive("controller", message)
        self.flush(name)

    def assert_empty(self) -> None:
        assert all(gateway.requests() == [] for gateway in self.gateways.values())
        for name in self.links:
            assert self.instances[name].sequences == {}, f"{name} holds an ended request"


@asynccontextmanager
async def running(*names, **options):
    """`names` say the roles: prefill-0, decode-0, mixed-0."""
    cluster = FakeCluster(names, **options)
    tasks = [asyncio.create_task(gateway.run()) for gateway in cluster.gateways.values()]
    tasks += [asyncio.create_task(cluster.host(name)) for name in names]
    await settle()
    try:
        yield cluster
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def settle(turns: int = 20) -> None:
    """Let everything that can happen without waiting happen."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def until(condition) -> None:
    """Sockets and threads take their time: the limit only ends a test that hangs."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  the loop's own turns are what is waited for
            await asyncio.sleep(0)


async def read(answer):
    """Every delta of an answer."""
    deltas = []
    while batch := await answer.next():
        deltas += batch
    return deltas


async def ask(gateway, call):
    answer = await gateway.open(call)
    try:
        return await read(answer)
    finally:
        gateway.close(answer)
