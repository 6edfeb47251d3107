"""What this machine offers to a deployment, and what is missing."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.packages import package_version
from engine.errors import TandemError

if TYPE_CHECKING:
    from collections.abc import Callable

OK, ABSENT, MISSING = "ok", "absent", "missing"
"""absent is a choice that this machine does not offer; missing keeps Tandem from serving."""
LEAST_SHM_BYTES = 256 << 20
COMMAND_S = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    state: str
    detail: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Every check in a fixed order; none of them starts anything."""
    checks: tuple[Callable[[], Finding], ...] = (
        _cpu,
        _memory,
        _shared_memory,
        _ray,
        _torch,
        _gpus,
        _nccl,
        _rdma,
        _nixl,
        _native_kernels,
        _compiler,
        _demo_model,
    )
    return [check() for check in checks]


def show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "state", "found", "what to do")
    colours = {OK: "green", ABSENT: "yellow", MISSING: "red"}
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.name, state, finding.detail, finding.advice)
    Console().print(table)


def _cpu() -> Finding:
    flags = _proc_field("/proc/cpuinfo", "flags").split()
    sets = [name for name in ("avx2", "avx512_bf16", "amx_bf16") if name in flags]
    count = len(os.sched_getaffinity(0))
    return Finding("cpu", OK, f"{count} cores, {' '.join(sets) or 'no vector extensions'}")


def _memory() -> Finding:
    kib = int((_proc_field("/proc/meminfo", "MemAvailable") or "0 kB").split()[0])
    return Finding("memory", OK, f"{kib / 2**20:.1f} GiB available")


def _shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free  # noqa: S108  the mount itself is examined
    state = OK if free >= LEAST_SHM_BYTES else MISSING
    advice = "" if state == OK else "enlarge /dev/shm: Ray keeps its object store there"
    return Finding("shared memory", state, f"{free / 2**30:.2f} GiB free in /dev/shm", advice)


def _ray() -> Finding:
    found = package_version("ray")
    if found is None:
        return Finding("ray", MISSING, "not installed", "install tandem-serve's dependencies")
    address = os.environ.get("RAY_ADDRESS")
    return Finding("ray", OK, f"{found}, " + (f"would join {address}" if address else "local"))


def _torch() -> Finding:
    found = package_version("torch")
    if found is None:
        return Finding("torch", MISSING, "not installed", "install tandem-serve's dependencies")
    return Finding("torch", OK, found)


def _gpus() -> Finding:
    advice = "serve with --device cpu, or install NVIDIA's driver"
    if shutil.which("nvidia-smi") is None:
        return Finding("gpu", ABSENT, "no nvidia-smi", advice)
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(  # noqa: S603
            query, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
    except subprocess.TimeoutExpired:
        advice = "its driver hangs: restart the machine"
        return Finding("gpu", ABSENT, f"nvidia-smi says nothing for {COMMAND_S:g} s", advice)
    names = [line.strip() for line in listed.stdout.splitlines() if line.strip()]
    if listed.returncode != 0 or not names:
        return Finding("gpu", ABSENT, "nvidia-smi finds none", advice)
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", ABSENT, "; ".join(names), "this torch was built without CUDA")
    return Finding("gpu", OK, "; ".join(names))


def _nccl() -> Finding:
    if importlib.util.find_spec("cupy") is None:
        advice = "install the gpu extra to move KV over NCCL"
        return Finding("nccl", ABSENT, "cupy is not installed", advice)
    library = package_version("nvidia-nccl-cu13") or ctypes.util.find_library("nccl")
    if library is None:
        return Finding("nccl", ABSENT, "no NCCL library", "install nvidia-nccl-cu13")
    return Finding("nccl", OK, str(library))


def _rdma() -> Finding:
    devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if not devices:
        return Finding("rdma", ABSENT, "no devices", "KV between hosts goes over TCP")
    return Finding("rdma", OK, " ".join(devices))


def _nixl() -> Finding:
    found = package_version("nixl")
    if found is None:
        advice = "install nixl: without it KV moves only within a host"
        return Finding("nixl and ucx", ABSENT, "not installed", advice)
    transports = os.environ.get("UCX_TLS", "UCX chooses the transport")
    return Finding("nixl and ucx", OK, f"nixl {found}, {transports}")


def _native_kernels() -> Finding:
    from engine.kernels import cpu_ops

    name = cpu_ops(1).name
    if name == "torch":
        advice = "reinstall where a C++ compiler is: serving works, at a lower speed"
        return Finding("native kernels", ABSENT, "plain torch", advice)
    return Finding("native kernels", OK, name)


def _compiler() -> Finding:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return Finding("compiler", OK, path)
    return Finding("compiler", ABSENT, "none", "install g++ to build the native kernels")


def _demo_model() -> Finding:
    from engine.checkpoint import DEMO, open_checkpoint

    try:
        checkpoint = open_checkpoint(DEMO)
    except TandemError as error:
        return Finding("built-in model", MISSING, str(error), "reinstall tandem-serve")
    return Finding("built-in model", OK, f"{len(checkpoint.config.layers)} layers")


def _proc_field(path: str, name: str) -> str:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
