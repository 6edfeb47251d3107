"""Which transport joins two ranks, and why: asked for every pair, never assumed."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import Unsupported, unknown_name

TRANSPORTS = ("shared_memory", "nixl", "nccl")


@dataclass(frozen=True, slots=True)
class Offered:
    """What one rank brings: its host, where its pool lies, and the transports it has open."""

    host: str
    device: str
    transports: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    name: str
    why: str


def choose(local: Offered, remote: Offered, preference: str = "auto") -> Choice:
    """The preferred transport, or the fastest for `auto`; Unsupported says what stands against."""
    if preference == "auto":
        return _fastest(local, remote)
    if preference not in TRANSPORTS:
        raise unknown_name("transfer.transport", preference, ("auto", *TRANSPORTS))
    obstacle = _obstacle(preference, local, remote)
    if obstacle is not None:
        raise Unsupported(f"transfer.transport {preference}: {obstacle}")
    return Choice(preference, "asked for by the config")


def _fastest(local: Offered, remote: Offered) -> Choice:
    obstacle = _obstacle("shared_memory", local, remote)
    if obstacle is None:
        return Choice("shared_memory", "both pools lie in one host's memory")
    nixl_obstacle = _obstacle("nixl", local, remote)
    if nixl_obstacle is None:
        return Choice("nixl", _lane(local, remote, obstacle))
    raise Unsupported(f"transfer.transport auto: shared_memory: {obstacle}; nixl: {nixl_obstacle}")


def _lane(local: Offered, remote: Offered, obstacle: str) -> str:
    if local.host == remote.host and _on_gpu(local) and _on_gpu(remote):
        return "two GPUs of one host, which it joins by CUDA IPC"
    return f"not shared memory: {obstacle}"


def _obstacle(name: str, local: Offered, remote: Offered) -> str | None:
    """Why a transport cannot join the two; None if it can."""
    if name == "shared_memory":
        if local.host != remote.host:
            return "the ranks run on different hosts"
        if _on_gpu(local) or _on_gpu(remote):
            return "a pool lies on a GPU"
    if name == "nccl":
        if not (_on_gpu(local) and _on_gpu(remote)):
            return "NCCL moves between GPUs only"
        if (local.host, local.device) == (remote.host, remote.device):
            return "NCCL refuses two ranks on one GPU"
    for side, offered in (("this", local), ("the other", remote)):
        if name not in offered.transports:
            return f"{side} rank has not opened it"
    return None


def _on_gpu(offered: Offered) -> bool:
    return offered.device != "cpu"
