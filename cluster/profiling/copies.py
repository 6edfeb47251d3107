"""Times copies of KV blocks between two pools of this machine."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from engine.kvcache import KvCache
from kvtransfer.auto import AutoTransport
from kvtransfer.plan import plan_transfer
from kvtransfer.transport import Pool

if TYPE_CHECKING:
    from kvtransfer.plan import Copies

COPIED_BLOCKS = (1, 4, 16, 64, 256, 1024)
COPY_TIMEOUT_S = 30.0


def copy_times(source: KvCache, rounds: int) -> list[dict[str, float]]:
    """Pulls of more and more blocks into a second pool; on GPUs, one of the next device."""
    device = _target_device(source)
    if device is None:
        return []
    counts = [count for count in COPIED_BLOCKS if count <= source.blocks]
    with _Ends(source, KvCache(source.layout, 0, blocks=counts[-1], device=device)) as ends:
        return [ends.time(count, rounds) for count in counts]


def _target_device(source: KvCache) -> torch.device | None:
    """None on a machine with one GPU: what lies between two cannot be measured there."""
    if source.memory.device.type == "cpu":
        return source.memory.device
    return torch.device("cuda", 1) if torch.cuda.device_count() > 1 else None


class _Ends:
    """Two pools that reach each other over what this machine offers."""

    def __init__(self, source: KvCache, target: KvCache) -> None:
        self._source, self._target = source, target
        pools = {
            name: Pool.of_tensor(kv.memory, kv.fd)
            for name, kv in (("source", source), ("target", target))
        }
        self._ways = {name: AutoTransport(name, pool) for name, pool in pools.items()}

    def __enter__(self) -> Self:
        for me, peer in (("source", "target"), ("target", "source")):
            self._ways[me].connect(peer, self._ways[peer].metadata(me))
        return self

    def __exit__(self, *_: object) -> None:
        for way in self._ways.values():
            way.close()
        self._target.close()

    def time(self, blocks: int, rounds: int) -> dict[str, float]:
        """Scattered blocks into scattered places, as pools look after a while."""
        generator = np.random.default_rng(blocks)
        layout = self._source.layout
        source = generator.permutation(self._source.blocks)[:blocks].tolist()
        target = generator.permutation(blocks).tolist()
        plan = plan_transfer(layout, layout, source, target)
        (pull,) = plan.of_target(0)
        times = [self._pull(pull.copies) for _ in range(rounds + 1)]
        return {"bytes": plan.total_bytes, "seconds": statistics.median(times[1:])}

    def _pull(self, copies: Copies) -> float:
        start_s = time.perf_counter()
        served = self._ways["source"].serve("target", copies)
        self._ways["target"].pull("source", copies).wait(COPY_TIMEOUT_S)
        served.wait(COPY_TIMEOUT_S)
        return time.perf_counter() - start_s
