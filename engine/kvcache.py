"""The memory that KV blocks lie in, on the device and, swapped out, on the host."""

from __future__ import annotations

import os
from itertools import chain
from typing import TYPE_CHECKING

import torch

from engine.attention import KvLayer
from engine.errors import BadConfig
from engine.shared_file import shared_file
from engine.swapping import Swapper, lane_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from engine.batch import Batch
    from engine.layout import KvLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


class KvCache:
    """One rank's pool, laid out as `KvLayout` says, and its host slots of one block each."""

    def __init__(
        self,
        layout: KvLayout,
        rank: int,
        *,
        blocks: int,
        device: torch.device,
        host_slots: int = 0,
    ) -> None:
        if blocks < 1:
            raise BadConfig("blocks", blocks, "the cache must hold at least one block")
        self.layout, self.rank = layout, rank
        self.blocks, self.host_slots = blocks, host_slots
        self.block_bytes = layout.block_bytes(rank)
        self.fd: int | None = None
        """The pool as a file that processes of this host can map through /proc; None on a GPU."""
        self.memory = self._allocate(blocks * self.block_bytes, device)
        slots = torch.zeros(
            (host_slots, self.block_bytes), dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        self._swapper = Swapper(self.memory.view(blocks, -1), slots, lane_of(device))
        self._layers = self._views()

    def layer(self, layer: int) -> KvLayer:
        """The pool's part of one of this stage's layers, counted over the whole model."""
        return self._layers[layer]

    def swapping(self, batch: Batch) -> AbstractContextManager[None]:
        """Swaps a batch's blocks; its pass belongs inside, and all is moved at the end."""
        touched: Iterable[int] = chain.from_iterable(chunk.blocks for chunk in batch.chunks)
        if self.layout.ranks > 1:  # who leads sees no more of other ranks than that they passed
            touched = range(self.blocks)
        return self._swapper.swapping(batch.swaps, touched)

    def close(self) -> None:
        """Gives the pool's file back; the memory goes with the last view of it."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _allocate(self, size: int, device: torch.device) -> torch.Tensor:
        if device.type != "cpu":
            return torch.zeros(size, dtype=torch.uint8, device=device)
        self.fd, memory = shared_file(size)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _views(self) -> dict[int, KvLayer]:
        layout, rank = self.layout, self.rank
        layers, heads = layout.stage_layers(layout.stage_of_rank(rank)), layout.rank_heads(rank)
        pool = self.memory.view(TORCH_DTYPES[layout.dtype]).view(
            self.blocks, len(layers), 2, len(heads), layout.block_tokens, layout.head_dim
        )
        return {layer: KvLayer(pool[:, i, 0], pool[:, i, 1]) for i, layer in enumerate(layers)}
