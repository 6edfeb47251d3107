"""A process that keeps one rank's weights on a GPU for the workers that read them there.

It belongs to no worker, so that any of them may end. Every worker that reads holds a connection;
once nobody does, the process ends and its memory is free. Its name is that of a socket, which only
one process can have: of several that are started at once all but one end at once.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import socket
import struct
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.instance.weight_memory import Exported, SharedMemory
    from engine.ops import Ops

    Progress = Callable[[int, int], None]
    Load = Callable[[Progress], Exported]

log = logging.getLogger(__name__)

TICK_S = 0.1
FIRST_READER_S = 60.0
"""Whoever started it has ended if nobody has come by then."""
SEND_S = 5.0
WAITING_READERS = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """The weights to be kept."""

    name: str
    """The same only for the same weights on the same GPU."""
    model: str
    max_length: int | None
    dtype: str
    device: str
    tensor_rank: int
    tensor_size: int
    stage: int
    stages: int


def address_of(name: str) -> str:
    """A socket that vanishes with its process; no file of it stays behind."""
    return f"\0tandem-weights-{os.getuid()}-{name}"


def is_ours(connection: socket.socket) -> bool:
    """Whether the same user is at the other end: the name alone keeps nobody out."""
    said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", said)
    return bool(user == os.getuid())


def listen(name: str) -> socket.socket | None:
    """None where another process has the name."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address_of(name))
    except OSError:
        listener.close()
        return None
    listener.listen(WAITING_READERS)
    return listener


class Keeper:
    """Loads, tells readers how far it is and then where the weights are, and counts readers."""

    def __init__(self, listener: socket.socket, load: Load) -> None:
        self._listener, self._load = listener, load
        self._readers: dict[socket.socket, bool] = {}
        """Whether each knows where the weights are."""
        self._progress = 0, 1

    def run(self) -> None:
        """Returns once nobody reads any more; raises what the loading raised."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        loading = thread.submit(self._load, self._got_on)
        try:
            self._serve(loading)
        finally:
            self._listener.close()
            for reader in self._readers:
                reader.close()

    def _serve(self, loading: Future[Exported]) -> None:
        deadline_s = time.monotonic() + FIRST_READER_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while self._readers or time.monotonic() < deadline_s:
                self._look(selector)
                self._tell(selector, loading)
                deadline_s = 0.0 if self._readers else deadline_s

    def _look(self, selector: selectors.BaseSelector) -> None:
        """Readers say nothing: what can be read of one is its end."""
        for key, _ in selector.select(TICK_S):
            reader = key.fileobj
            assert isinstance(reader, socket.socket)
            if reader is self._listener:
                self._welcome(selector)
            else:
                self._drop(selector, reader)

    def _welcome(self, selector: selectors.BaseSelector) -> None:
        reader, _ = self._listener.accept()
        if not is_ours(reader):
            reader.close()
            return
        reader.settimeout(SEND_S)
        self._readers[reader] = False
        selector.register(reader, selectors.EVENT_READ)

    def _tell(self, selector: selectors.BaseSelector, loading: Future[Exported]) -> None:
        done = loading.done()
        said = _where(loading.result()) if done else {"progress": self._progress}
        line = json.dumps(said).encode() + b"\n"
        for reader in [reader for reader, knows in self._readers.items() if not knows]:
            try:
                reader.sendall(line)
            except OSError:
                self._drop(selector, reader)
            else:
                self._readers[reader] = done

    def _drop(self, selector: selectors.BaseSelector, reader: socket.socket) -> None:
        selector.unregister(reader)
        del self._readers[reader]
        reader.close()

    def _got_on(self, read_bytes: int, all_bytes: int) -> None:
        self._progress = read_bytes, all_bytes


def _where(exported: Exported) -> dict[str, object]:
    return asdict(exported) | {"handle": exported.handle.hex()}


def load(wanted: Wanted, memory: SharedMemory, ops: Ops, progress: Progress) -> Exported:
    """Fills memory that lasts as long as `memory` does."""
    import torch

    from engine.checkpoint import open_checkpoint
    from engine.kvcache import TORCH_DTYPES, KvCache
    from engine.model.loading import RankWeights
    from engine.model.storage import OnePiece
    from engine.parallel import Parallel

    checkpoint = open_checkpoint(wanted.model, wanted.max_length)
    parallel = Parallel(wanted.tensor_rank, wanted.tensor_size, wanted.stage, wanted.stages)
    layout = checkpoint.layout(
        block_tokens=16,
        dtype=wanted.dtype,
        tensor_parallel=wanted.tensor_size,
        pipeline_parallel=wanted.stages,
    )
    kv = KvCache(layout, parallel.rank, blocks=1, device=torch.device(wanted.device))
    weights = RankWeights(checkpoint, parallel, TORCH_DTYPES[wanted.dtype], kv)
    piece = memory.allocate(weights.weigh().nbytes)
    weights.load(ops, OnePiece(piece, lambda: None, filled=False), progress)
    kv.close()
    checkpoint.release()
    return memory.export(piece)


def main() -> None:
    """Of a process that whoever started it waits for: it ends when the name is taken, and what goes
    on is nobody's child, so that no worker's end ends it."""
    wanted = Wanted(**json.loads(sys.argv[1]))
    listener = listen(wanted.name)
    if listener is None or os.fork():
        os._exit(0)
    os.setsid()
    try:
        _keep(wanted, listener)
    except Exception:
        log.exception("weights not kept model=%s device=%s", wanted.model, wanted.device)
        os._exit(1)
    os._exit(0)  # whatever still loads, nobody waits for


def _keep(wanted: Wanted, listener: socket.socket) -> None:
    import torch

    from cluster.instance.weight_memory import GpuMemory
    from cluster.watching.logs import set_up_logging
    from engine.runner import choose_ops

    set_up_logging()
    device = torch.device(wanted.device)
    memory, ops = GpuMemory(device), choose_ops(device, 1, deterministic=False)
    log.info("keeping weights model=%s device=%s", wanted.model, memory.identity)
    Keeper(listener, partial(load, wanted, memory, ops)).run()
    log.info("nobody reads the weights any more model=%s", wanted.model)


if __name__ == "__main__":
    main()
