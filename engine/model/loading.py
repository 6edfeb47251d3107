"""Builds a rank's decoder: over shapes alone to see what it takes, and over its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.model.decoder import Decoder
from engine.model.storage import META, Measured
from engine.model.weights import Loader
from engine.ops import TorchOps

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.checkpoint import Checkpoint
    from engine.kvcache import KvCache
    from engine.model.storage import Storage
    from engine.ops import Ops
    from engine.parallel import Parallel


@dataclass(frozen=True, slots=True)
class Weighed:
    nbytes: int
    """Of the one piece of memory that would hold all."""
    order: str
    """The same only for the same tensors in the same order."""
    read_bytes: int


@dataclass(frozen=True, slots=True)
class RankWeights:
    """What one rank reads of a checkpoint, and in which numbers it computes."""

    checkpoint: Checkpoint
    parallel: Parallel
    dtype: torch.dtype
    kv: KvCache

    @torch.inference_mode()
    def weigh(self) -> Weighed:
        storage = Measured()
        loader = Loader(
            self.checkpoint, self.parallel, TorchOps(), META, self.dtype, storage=storage
        )
        Decoder(loader, self.kv)
        return Weighed(storage.nbytes, storage.order, loader.read_bytes)

    @torch.inference_mode()
    def load(
        self, ops: Ops, storage: Storage, progress: Callable[[int, int], None] | None
    ) -> Decoder:
        """`progress` is told of the bytes read so far, and of all that are to be read."""
        report = None
        if progress is not None:
            all_bytes = self.weigh().read_bytes

            def report(read_bytes: int) -> None:
                progress(read_bytes, all_bytes)

        device = self.kv.memory.device
        loader = Loader(
            *(self.checkpoint, self.parallel, ops, device, self.dtype),
            storage=storage,
            progress=report,
        )
        return Decoder(loader, self.kv)
