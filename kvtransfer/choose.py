"""Which transport joins two ranks, and why: asked for every pair, never assumed."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import Unsupported, unknown_name

TRANSPORTS = ("shared_memory", "cuda_ipc", "nixl", "nccl")
FASTEST_FIRST = ("shared_memory", "cuda_ipc", "nixl")


@dataclass(frozen=True, slots=True)
class Offered:
    """What one rank brings: its host, where its pool lies, and the transports it has open."""

    host: str
    device: str
    """cpu, or a GPU by a name that all processes of its host have for it."""
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
    obstacles: dict[str, str] = {}
    for name in FASTEST_FIRST:
        obstacle = _obstacle(name, local, remote)
        if obstacle is None:
            return Choice(name, _reason(name, local, remote, obstacles))
        obstacles[name] = obstacle
    all_of_them = "; ".join(f"{name}: {obstacle}" for name, obstacle in obstacles.items())
    raise Unsupported(f"transfer.transport auto: {all_of_them}")


def _reason(name: str, local: Offered, remote: Offered, obstacles: dict[str, str]) -> str:
    if name == "shared_memory":
        return "both pools lie in one host's memory"
    if name == "cuda_ipc":
        return "both pools lie on one GPU"
    if _in_the_places("cuda_ipc", local, remote) is None:
        return f"not cuda_ipc: {obstacles['cuda_ipc']}"
    if local.host == remote.host and _on_gpu(local) and _on_gpu(remote):
        return "two GPUs of one host, which it joins by CUDA IPC"
    return f"not shared memory: {obstacles['shared_memory']}"


def _obstacle(name: str, local: Offered, remote: Offered) -> str | None:
    """Why a transport cannot join the two; None if it can."""
    obstacle = _in_the_places(name, local, remote)
    if obstacle is not None:
        return obstacle
    for side, offered in (("this", local), ("the other", remote)):
        if name not in offered.transports:
            return f"{side} rank has not opened it"
    return None


def _in_the_places(name: str, local: Offered, remote: Offered) -> str | None:
    """What keeps a transport from joining memory that lies where the two pools do."""
    on_gpus = _on_gpu(local) and _on_gpu(remote)
    one_place = (local.host, local.device) == (remote.host, remote.device)
    match name:
        case "shared_memory" if local.host != remote.host:
            return "the ranks run on different hosts"
        case "shared_memory" if _on_gpu(local) or _on_gpu(remote):
            return "a pool lies on a GPU"
        case "cuda_ipc" if not (on_gpus and one_place):
            return "it joins pools on one GPU only"
        case "nccl" if not on_gpus:
            return "NCCL moves between GPUs only"
        case "nccl" if one_place:
            return "NCCL refuses two ranks on one GPU"
    return None


def _on_gpu(offered: Offered) -> bool:
    return offered.device != "cpu"
