"""The Ray that a deployment stands on: one of our own, or one that is there already."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from cluster.actors import NAMESPACE, find_controller
from engine.errors import BadConfig, InstanceLost
from engine.messages import Role

if TYPE_CHECKING:
    from cluster.config import Config, PoolShape

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOCAL_OBJECT_STORE_BYTES = 80 << 20
"""Ray's least; nothing of ours travels through the object store."""
WORKER_NICENESS = 0
"""Ray's own 15 lets whatever else runs on a machine take a worker's cores while a step waits."""


@dataclass(frozen=True, slots=True)
class RaySession:
    owned: bool
    """Started by us, on this machine only, and stopped by us."""
    cpus: float
    gpus: float

    def stop(self) -> None:
        ray.shutdown()


def start_ray(address: str | None) -> RaySession:
    """Joins the cluster at `address` or RAY_ADDRESS; without either, starts one on this machine."""
    owned = address is None and not os.environ.get("RAY_ADDRESS")
    if owned:
        _start_here()
    else:
        _join(address)
    total = ray.cluster_resources()
    return RaySession(owned, total.get("CPU", 0.0), total.get("GPU", 0.0))


def _start_here() -> None:
    """Ray's processes do not hear the SIGTERM that a supervisor sends to our whole group.

    A blocked signal is inherited, so they stay up until the streams have ended and we stop them.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        ray.init(
            address="local",
            _node_ip_address=LOOPBACK,
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            namespace=NAMESPACE,
            logging_level=logging.WARNING,
            _system_config={"worker_niceness": WORKER_NICENESS},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _join(address: str | None) -> None:
    try:
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        rule = f"no Ray cluster answers there: {str(error).splitlines()[0]}"
        raise BadConfig("address", address or os.environ["RAY_ADDRESS"], rule) from error
    try:
        find_controller()
    except InstanceLost:
        return
    raise BadConfig("address", address, "this Ray cluster serves a Tandem deployment already")


def choose_device(config: Config, session: RaySession) -> str:
    """`auto` is cuda where every worker can have a GPU."""
    if config.device != "auto":
        return config.device
    workers = sum(pool.workers * pool.instances for pool in _pools(config))
    device = "cuda" if session.gpus >= max(workers, 1) else "cpu"
    log.info("device chosen device=%s gpus=%g workers=%d", device, session.gpus, workers)
    return device


def _pools(config: Config) -> tuple[PoolShape, ...]:
    return tuple(shape for role in Role for shape in config.pools.of(role).shapes)
