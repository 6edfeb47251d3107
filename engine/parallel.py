"""One rank's place in a model cut by tensor and by pipeline, and how it talks to the others."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import distributed

from engine.clock import SystemClock
from engine.device_events import await_event, recorded
from engine.errors import BadConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from engine.model.config import ModelConfig

MEET_S = 900.0
"""How long ranks wait for one another to start and to load their weights."""
WAIT_S = 60.0
"""How long a rank waits for another within a batch before its call fails."""
IDLE = timedelta(days=3650)
"""How long it waits for the next batch; a rank that dies is noticed at once all the same."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """Ranks count tensor ranks first: rank = stage * tensor_size + tensor_rank."""

    tensor_rank: int = 0
    tensor_size: int = 1
    stage: int = 0
    stages: int = 1
    tensor_group: ProcessGroup | None = None
    peers: ProcessGroup | None = None
    """All ranks, for hidden states from stage to stage."""
    control: ProcessGroup | None = None
    """All ranks, over gloo, for batches: an idle instance may wait here for ever."""
    answers: ProcessGroup | None = None
    """All ranks, over gloo, for drawn tokens: these are waited for within bounds."""
    wait_s: float = WAIT_S
    ordered: bool = False
    """Whether sums are taken in the order of ranks, so that a row's do not depend on its place."""

    @property
    def rank(self) -> int:
        return self.stage * self.tensor_size + self.tensor_rank

    @property
    def size(self) -> int:
        return self.stages * self.tensor_size

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def drawing_rank(self) -> int:
        """The rank that holds whole rows of logits."""
        return (self.stages - 1) * self.tensor_size

    def add_up(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of every tensor rank's part, which it may overwrite."""
        if self.tensor_size == 1:
            return part
        if self.ordered and self.tensor_size > 2:
            return torch.stack(self._gather(part)).sum(0)
        distributed.all_reduce(part, group=self.tensor_group)
        return part

    def await_tensor_ranks(self, device: torch.device) -> None:
        """What every tensor rank did before this stands, for whoever sees this rank go on."""
        self.add_up(torch.zeros(1, device=device))

    def await_ranks(self) -> None:
        """Returns once every rank has come here."""
        if self.size > 1:
            distributed.barrier(group=self.answers)

    def await_device(self, device: torch.device) -> None:
        """Returns once the device is through, within bounds: what watches over sums that are
        asked for one by one knows nothing of those in a graph."""
        if self.size > 1 and device.type == "cuda":
            await_event(recorded(), self.wait_s, SystemClock())

    def gather_columns(self, part: torch.Tensor) -> torch.Tensor:
        """Every tensor rank's columns side by side."""
        if self.tensor_size == 1:
            return part
        return torch.cat(self._gather(part), dim=-1)

    def _gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(part) for _ in range(self.tensor_size)]
        distributed.all_gather(parts, part.contiguous(), group=self.tensor_group)
        return parts

    def hand_on(self, hidden: torch.Tensor) -> None:
        """Gives the hidden states to the next stage."""
        distributed.send(hidden.contiguous(), self.rank + self.tensor_size, group=self.peers)

    def take_over(self, into: torch.Tensor) -> torch.Tensor:
        """Waits for the hidden states of the stage before."""
        distributed.recv(into, self.rank - self.tensor_size, group=self.peers)
        return into

    def check(self, config: ModelConfig) -> None:
        """Whether the model can be cut this way."""
        tensor, layers = self.tensor_size, len(config.layers)
        if self.stages > layers:
            raise BadConfig("pipeline_parallel", self.stages, f"the model has {layers} layers")
        if config.heads % tensor:
            rule = f"must divide the model's {config.heads} attention heads"
            raise BadConfig("tensor_parallel", tensor, rule)
        if config.kv_heads % tensor and tensor % config.kv_heads:
            rule = f"must divide the model's {config.kv_heads} KV heads or be a multiple of them"
            raise BadConfig("tensor_parallel", tensor, rule)
        widths = {config.intermediate} | ({config.moe.intermediate} if config.moe else set())
        for width in sorted(widths):
            if width % tensor:
                raise BadConfig("tensor_parallel", tensor, f"must divide the MLP's width {width}")


ALONE = Parallel()


def join(
    rank: int,
    *,
    tensor_size: int,
    stages: int,
    init_method: str,
    device: torch.device,
    ordered: bool = False,
    wait_s: float = WAIT_S,
) -> Parallel:
    """Meets the other ranks of one model at `init_method`; every rank calls this once."""
    size = tensor_size * stages
    if size == 1:
        return ALONE
    backend = "nccl" if device.type == "cuda" else "gloo"
    meet, wait = timedelta(seconds=MEET_S), timedelta(seconds=wait_s)
    distributed.init_process_group(
        backend, init_method=init_method, rank=rank, world_size=size, timeout=meet
    )
    tensor_groups = [
        distributed.new_group(
            list(range(stage * tensor_size, (stage + 1) * tensor_size)), timeout=wait
        )
        for stage in range(stages)
    ]
    stage, tensor_rank = divmod(rank, tensor_size)
    return Parallel(
        tensor_rank=tensor_rank,
        tensor_size=tensor_size,
        stage=stage,
        stages=stages,
        tensor_group=tensor_groups[stage],
        peers=distributed.new_group(timeout=wait),
        control=distributed.new_group(backend="gloo", timeout=IDLE),
        answers=distributed.new_group(backend="gloo", timeout=wait),
        wait_s=wait_s,
        ordered=ordered,
    )


def await_all(parallel: Parallel) -> None:
    """Returns once every rank has come here: all have loaded."""
    if parallel.size > 1:
        distributed.barrier()


def leave(parallel: Parallel) -> None:
    """Takes this rank out, once nothing is asked of its device any more."""
    if parallel.size > 1 and distributed.is_initialized():
        distributed.destroy_process_group()
