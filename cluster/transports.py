"""Which transport a worker's KV pool is served by."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from engine.errors import BadConfig
from kvtransfer.transport import Pool

if TYPE_CHECKING:
    from cluster.config import TransferConfig
    from engine.kvcache import KvCache
    from kvtransfer.transport import Transport

log = logging.getLogger(__name__)


def open_transport(me: str, kv: KvCache, settings: TransferConfig) -> Transport:
    """The one the config names; `auto` is shared memory on a CPU and NIXL on a GPU."""
    pool = Pool.of_tensor(kv.memory, kv.fd)
    name = settings.transport
    if name == "auto":
        name = "shared_memory" if pool.fd is not None else "nixl"
        log.info("transport chosen rank=%s transport=%s device=%s", me, name, pool.device)
    if name == "shared_memory":
        from kvtransfer.shared_memory import SharedMemoryTransport

        return SharedMemoryTransport(me, pool, settings.copies)
    if name == "nixl":
        from kvtransfer.nixl import NixlTransport

        return NixlTransport(me, pool, settings.copies)
    raise BadConfig("transfer.transport", name, "not available in this build")
