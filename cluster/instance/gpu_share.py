"""Keeps a worker to its part of a GPU's multiprocessors, through NVIDIA's MPS."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import BadConfig

if TYPE_CHECKING:
    from collections.abc import MutableMapping

PIPES, PERCENTAGE = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
DEFAULT_PIPES = "/tmp/nvidia-mps"  # noqa: S108  where MPS looks if it is told nothing else


def limit_multiprocessors(share: float, device: str, environ: MutableMapping[str, str]) -> None:
    """Before a process first uses CUDA, which reads this then; it holds while the process lives."""
    if device == "cpu":
        raise BadConfig("sm_share", share, "is for workers on GPUs")
    control = Path(environ.get(PIPES, DEFAULT_PIPES)) / "control"
    if not control.exists():
        rule = f"needs the MPS daemon on the node (nvidia-cuda-mps-control -d): no {control}"
        raise BadConfig("sm_share", share, rule)
    environ[PERCENTAGE] = f"{100 * share:g}"
