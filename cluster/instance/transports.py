"""Which transport a worker's KV pool is served by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtransfer.auto import EVERYWHERE, AutoTransport
from kvtransfer.transport import Pool

if TYPE_CHECKING:
    from cluster.config import TransferConfig
    from engine.kvcache import KvCache
    from kvtransfer.transport import Transport


def open_transport(me: str, kv: KvCache, settings: TransferConfig, *, one_host: bool) -> Transport:
    """What the config names. On a single host CPU workers need no more than shared memory."""
    pool = Pool.of_tensor(kv.memory, kv.fd)
    among = ("shared_memory",) if one_host and pool.fd is not None else EVERYWHERE
    return AutoTransport(me, pool, settings.copies, preference=settings.transport, among=among)
