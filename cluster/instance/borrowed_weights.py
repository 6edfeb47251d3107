"""A worker's side of weights that a process of the same GPU keeps for several."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import engine.model
from cluster.instance.weight_keeper import Wanted, address_of, is_ours
from cluster.instance.weight_memory import Exported
from engine.errors import BadConfig, InstanceLost
from engine.kvcache import TORCH_DTYPES, KvCache
from engine.model.loading import RankWeights
from engine.model.storage import OnePiece

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.instance.weight_memory import SharedMemory
    from engine.checkpoint import Checkpoint
    from engine.model.loading import Weighed
    from engine.parallel import Parallel

    Start = Callable[[Wanted], None]
    Progress = Callable[[int, int], None]

START_S = 60.0
SILENCE_S = 120.0
"""A process that keeps weights tells at every tick how far it is, until they are there."""
BLOCK_TOKENS = 16
"""Of the pool that a model is built with to be weighed, which no weight depends on."""
TRIES = 3
"""It may be ending at the moment when it is found."""


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Weights that may be read for as long as the process that keeps them lives."""

    memory: torch.Tensor
    _shared: SharedMemory
    _link: socket.socket

    def storage(self) -> OnePiece:
        return OnePiece(self.memory, self.check_alive, filled=True)

    def check_alive(self) -> None:
        """It says nothing any more: what can be read is its end."""
        ended = select.poll()
        ended.register(self._link, select.POLLIN)
        if ended.poll(0):
            raise InstanceLost("the process that keeps the weights has ended")

    def close(self) -> None:
        """Once nothing that computes with them is asked for any more."""
        self._shared.close(self.memory)
        self._link.close()


def start_keeper(wanted: Wanted) -> None:
    """Returns when there is one, this or another."""
    command = [sys.executable, "-m", "cluster.instance.weight_keeper", json.dumps(asdict(wanted))]
    subprocess.run(  # noqa: S603  our own command
        command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=START_S
    )


def weigh(checkpoint: Checkpoint, parallel: Parallel, dtype: str) -> Weighed:
    """What a rank's weights take, without any of them."""
    layout = checkpoint.layout(
        block_tokens=BLOCK_TOKENS,
        dtype=dtype,
        tensor_parallel=parallel.tensor_size,
        pipeline_parallel=parallel.stages,
    )
    kv = KvCache(layout, parallel.rank, blocks=1, device=torch.device("cpu"))
    weighed = RankWeights(checkpoint, parallel, TORCH_DTYPES[dtype], kv).weigh()
    kv.close()
    return weighed


def borrow_weights(
    checkpoint: Checkpoint,
    max_length: int | None,
    parallel: Parallel,
    *,
    dtype: str,
    shared: SharedMemory,
    device: str,
    progress: Progress,
    start: Start = start_keeper,
) -> Borrowed:
    weighed = weigh(checkpoint, parallel, dtype)
    place = (parallel.tensor_rank, parallel.tensor_size, parallel.stage, parallel.stages)
    wanted = Wanted("", checkpoint.source, max_length, dtype, device, *place)
    name = _name(wanted, checkpoint, weighed, shared.identity)
    named = replace(wanted, name=name)
    return borrow(named, weighed.nbytes, shared, start=start, progress=progress)


def _name(wanted: Wanted, checkpoint: Checkpoint, weighed: Weighed, gpu: str) -> str:
    """Differs wherever files, numbers, parts, devices or the code that loads them do."""
    digest = blake2b(digest_size=12)
    for file in sorted(checkpoint.directory.glob("*.safetensors")):
        status = file.stat()
        digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    for code in _loading_code():
        digest.update(code.read_bytes())
    parts = (asdict(wanted), checkpoint.fingerprint, weighed.order, gpu)
    digest.update(repr(parts).encode())
    return digest.hexdigest()


def _loading_code() -> list[Path]:
    """What decides how weights lie; a version is not known where the package is not installed."""
    assert engine.model.__file__ is not None
    return sorted(Path(engine.model.__file__).parent.glob("*.py"))


def borrow(
    wanted: Wanted, nbytes: int, shared: SharedMemory, *, start: Start, progress: Progress
) -> Borrowed:
    """Starts a process that keeps the weights if there is none, and waits until they are there."""
    for _ in range(TRIES):
        link = _connect(wanted.name)
        if link is None:
            start(wanted)
            link = _connect(wanted.name)
        if link is not None and (exported := _await(link, progress)) is not None:
            assert exported.nbytes == nbytes, (exported, nbytes)
            return Borrowed(shared.open(exported), shared, link)
    raise InstanceLost(f"no process keeps the weights of {wanted.model}: its log says why")


def _connect(name: str) -> socket.socket | None:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.settimeout(SILENCE_S)
    try:
        link.connect(address_of(name))
    except ConnectionError:
        link.close()
        return None
    if not is_ours(link):
        link.close()
        raise BadConfig("engine.share_weights", "true", "another user of the host has the name")
    return link


def _await(link: socket.socket, progress: Progress) -> Exported | None:
    """None if it has ended, or is stuck."""
    try:
        for line in link.makefile("rb"):
            said = json.loads(line)
            if "handle" in said:
                return Exported(**said | {"handle": bytes.fromhex(said["handle"])})
            progress(*said["progress"])
    except (ConnectionError, TimeoutError):
        pass
    link.close()
    return None
