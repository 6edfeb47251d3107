"""Instances' ranks with real weights: the first in this process, the others in their own."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cluster.instance.mover import RankMover, rank_name
from engine.checkpoint import DEMO_DIRECTORY, open_checkpoint
from engine.errors import TransferError
from engine.grammar import GrammarCompiler
from engine.parallel import join
from engine.parallel_runner import ParallelRunner, follow
from engine.runner import Runner
from engine.sampler import Sampler
from engine.tokenizer import Tokenizer
from kvtransfer.shared_memory import PeerPool, SharedMemoryTransport, SharedPool
from kvtransfer.transport import Pool, decode_metadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

    from numpy.typing import NDArray

    from engine.batch import Executor
    from engine.layout import KvLayout
    from kvtransfer.transfer import PullOrder

BLOCKS, BLOCK_TOKENS = 96, 4
ANSWER_S = 600.0


class Rank:
    """One rank's runner and its way to the others' pools."""

    def __init__(self, directory: Path, name: str, rank: int, cut: dict[str, Any]) -> None:
        checkpoint = open_checkpoint(str(directory))
        tokenizer = Tokenizer.open(DEMO_DIRECTORY)
        sampler = Sampler(
            tokenizer.vocab_size, GrammarCompiler(tokenizer), checkpoint.eos_token_ids
        )
        parallel = join(rank, device=torch.device("cpu"), **cut)
        self.runner = Runner(
            checkpoint,
            sampler=sampler,
            dtype="float32",
            parallel=parallel,
            blocks=BLOCKS,
            block_tokens=BLOCK_TOKENS,
            layer_groups=2,
        )
        kv = self.runner.kv
        self.transport = SharedMemoryTransport(
            rank_name(name, rank), Pool.of_tensor(kv.memory, kv.fd)
        )
        self.mover = RankMover(self.runner.layout, rank, self.transport)

    def pull(self, order: PullOrder) -> TransferError | None:
        try:
            asyncio.run(self.mover.pull(order))
        except TransferError as error:
            return error
        return None

    def close(self) -> None:
        self.transport.close()
        self.runner.close()


def follow_one(
    pipe: Connection, directory: Path, name: str, rank: int, cut: dict[str, Any]
) -> None:
    """What a follower's process runs: batches here, and pulls in a thread beside them."""
    me = Rank(directory, name, rank, cut)
    pipe.send(me.transport.metadata(""))
    threading.Thread(target=answer, args=(pipe, me), daemon=True).start()
    follow(me.runner)
    me.close()


def answer(pipe: Connection, me: Rank) -> None:
    while True:
        match pipe.recv():
            case (str(peer), bytes(metadata)):
                me.transport.connect(peer, metadata)
            case order:
                pipe.send(me.pull(order))


class Engine:
    """All ranks of one instance, as a driver without asyncio uses them."""

    def __init__(self, name: str, first: Rank, pipes: list[Connection]) -> None:
        self.name, self.first, self._pipes = name, first, pipes
        self.executor: Executor = ParallelRunner(first.runner) if pipes else first.runner
        self.metadata = [first.transport.metadata("")]
        self.metadata += [_receive(pipe) for pipe in pipes]
        self.pools = [
            PeerPool(decode_metadata("shared_memory", SharedPool, metadata))
            for metadata in self.metadata
        ]

    @property
    def layout(self) -> KvLayout:
        return self.first.runner.layout

    def meet(self, peer: Engine) -> None:
        for rank, metadata in enumerate(peer.metadata):
            self.first.transport.connect(rank_name(peer.name, rank), metadata)
            for pipe in self._pipes:
                pipe.send((rank_name(peer.name, rank), metadata))

    def pull(self, order: PullOrder) -> TransferError | None:
        """In every rank, as cluster.mover's InstanceMover does."""
        for pipe in self._pipes:
            pipe.send(order)
        results = [self.first.pull(order), *(_receive(pipe) for pipe in self._pipes)]
        return next((error for error in results if error is not None), None)

    def read(self, blocks: tuple[int, ...] | list[int], tokens: int) -> NDArray[np.float32]:
        """The KV that stands in the ranks' pools: (layer, key or value, head, token, dim)."""
        layout = self.layout
        shape = (layout.layers, 2, layout.kv_heads, len(blocks) * BLOCK_TOKENS, layout.head_dim)
        found = np.empty(shape, np.float32)
        for rank, pool in enumerate(self.pools):
            memory = pool._bytes
            for layer in layout.stage_layers(layout.stage_of_rank(rank)):
                for value in (0, 1):
                    for head in layout.rank_heads(rank):
                        for i, block in enumerate(blocks):
                            at = layout.offset(rank, block, layer, value=bool(value), head=head)
                            cells = memory[at : at + layout.head_bytes].view(np.float32)
                            part = slice(i * BLOCK_TOKENS, (i + 1) * BLOCK_TOKENS)
                            found[layer, value, head, part] = cells.reshape(BLOCK_TOKENS, -1)
        return found[:, :, :, :tokens]

    def close(self) -> None:
        for pool in self.pools:
            pool.close()
        if isinstance(self.executor, ParallelRunner):
            self.executor.close()
        self.first.close()


def _receive(pipe: Connection) -> Any:
    assert pipe.poll(ANSWER_S), "a follower does not answer"
    return pipe.recv()


@contextmanager
def engine(
    directory: Path, meeting: Path, name: str, tensor_size: int = 1, stages: int = 1
) -> Iterator[Engine]:
    """At most one of several ranks at a time: torch has one group of ranks in a process."""
    cut = {"tensor_size": tensor_size, "stages": stages, "init_method": f"file://{meeting}"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cluster.engines"])
    pipes, followers = [], []
    for rank in range(1, tensor_size * stages):
        ours, theirs = context.Pipe()
        follower = context.Process(target=follow_one, args=(theirs, directory, name, rank, cut))
        follower.start()
        pipes.append(ours)
        followers.append(follower)
    try:
        opened = Engine(name, Rank(directory, name, 0, cut), pipes)
        yield opened
        opened.close()
        for follower in followers:
            follower.join(ANSWER_S)
    finally:
        for follower in followers:
            follower.kill()
            follower.join()
