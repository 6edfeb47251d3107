"""One rank of a model on this machine, whose passes are timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cluster.config import parse_config
from cluster.instance.rank import count_blocks
from cluster.profiling.timing import PassTimer
from engine.checkpoint import open_checkpoint
from engine.parallel import ALONE
from engine.runner import Runner, resolve_dtype, resolve_kv_dtype
from engine.sampler import Sampler

if TYPE_CHECKING:
    from cluster.config import Config
    from engine.batch import Executor
    from engine.parallel import Parallel

MOST_KV_BYTES = 1 << 30
"""Of the pool that is measured; passes that need more are left out."""


@dataclass(frozen=True, slots=True)
class RankSettings:
    model: str
    device: str = "cpu"
    """As torch calls it."""
    threads: int = 1
    dtype: str = "auto"
    kv_dtype: str = "auto"

    @property
    def config(self) -> Config:
        """What deploys such a rank."""
        engine = {"dtype": self.dtype, "kv_dtype": self.kv_dtype, "threads": self.threads}
        return parse_config({"model": self.model, "engine": engine})


class Rank:
    """A runner whose pool holds every pass at once, its blocks given out from the start."""

    def __init__(
        self,
        settings: RankSettings,
        parallel: Parallel = ALONE,
        *,
        most_kv_bytes: int = MOST_KV_BYTES,
    ) -> None:
        torch.set_num_threads(settings.threads)
        checkpoint, device = open_checkpoint(settings.model), settings.device
        dtype = resolve_dtype(settings.dtype, checkpoint.config.dtype, torch.device(device))
        kv_dtype = resolve_kv_dtype(settings.kv_dtype, dtype, torch.device(device))
        config = settings.config
        self.dtype, self._vocab = dtype, checkpoint.config.vocab
        self.max_length = checkpoint.max_length
        self._alone = device == "cpu" and settings.threads == 1 and parallel.size == 1
        self.layout = checkpoint.layout(
            block_tokens=config.engine.block_tokens,
            dtype=kv_dtype,
            tensor_parallel=parallel.tensor_size,
        )
        most = count_blocks(config, checkpoint, self.layout, device)
        self.description = {
            "tensor_parallel": parallel.tensor_size,
            "pipeline_parallel": 1,
            "kv_capacity_tokens": most * self.layout.block_tokens,
        }
        self.blocks = min(most, most_kv_bytes // self.layout.block_bytes(0))
        self.runner = Runner(
            checkpoint,
            sampler=Sampler(self._vocab),
            device=device,
            dtype=dtype,
            kv_dtype=kv_dtype,
            parallel=parallel,
            blocks=self.blocks,
            block_tokens=self.layout.block_tokens,
            threads=settings.threads,
        )
        self.timer = self.timer_of(self.runner)

    def timer_of(self, executor: Executor) -> PassTimer:
        block_tokens = self.layout.block_tokens
        return PassTimer(executor, self.blocks, block_tokens, self._vocab, alone=self._alone)
