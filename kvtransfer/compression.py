"""KV made smaller for slow links: int8, or 4 bits with per-channel keys and per-token values.

The unit is a cell: one head's keys and values of one layer in one block, coded on its own, so
that what a target rank needs is a selection of cells. Off by default; `pays` says when it helps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from engine.errors import BadMessage, unknown_name
from engine.kvcache import TORCH_DTYPES

if TYPE_CHECKING:
    from engine.layout import KvLayout

SMALLEST = 1e-30
"""Keeps the scale of an all-zero run from being zero."""


class Codec(Protocol):
    """Codes [blocks, layers, 2, heads, tokens, dim] to [blocks, layers, heads, cell bytes]."""

    @property
    def name(self) -> str: ...

    def cell_bytes(self, tokens: int, dim: int) -> int: ...

    def encode(self, kv: torch.Tensor) -> torch.Tensor: ...

    def decode(
        self, cells: torch.Tensor, tokens: int, dim: int, dtype: torch.dtype
    ) -> torch.Tensor: ...


class Int8:
    """One scale for a head's keys in a block and one for its values: half of bfloat16."""

    name = "int8"

    def cell_bytes(self, tokens: int, dim: int) -> int:
        return 2 * (4 + tokens * dim)

    def encode(self, kv: torch.Tensor) -> torch.Tensor:
        kv = _cells_first(kv.float()).flatten(-2)
        scale = kv.abs().amax(-1, keepdim=True).div_(127).clamp_(min=SMALLEST)
        codes = kv.div(scale).round_().to(torch.int8)
        return torch.cat([_bytes(scale), _bytes(codes)], -1).flatten(-2)

    def decode(
        self, cells: torch.Tensor, tokens: int, dim: int, dtype: torch.dtype
    ) -> torch.Tensor:
        halves = cells.reshape(*cells.shape[:-1], 2, -1)
        scale = halves[..., :4].contiguous().view(torch.float32)
        kv = halves[..., 4:].view(torch.int8).float().mul_(scale)
        return _cells_last(kv.reshape(*kv.shape[:-1], tokens, dim).to(dtype))


class Int4:
    """4 bits, keys scaled by channel over the block's tokens, values by token over channels.

    Keys have a few channels of far larger values, values have not (KIVI's observation).
    """

    name = "int4"

    def cell_bytes(self, tokens: int, dim: int) -> int:
        return tokens * dim + 4 * dim + 4 * tokens

    def encode(self, kv: torch.Tensor) -> torch.Tensor:
        keys, values = _cells_first(kv.float()).unbind(-3)
        return torch.cat([*_encode_4_bits(keys, -2), *_encode_4_bits(values, -1)], -1)

    def decode(
        self, cells: torch.Tensor, tokens: int, dim: int, dtype: torch.dtype
    ) -> torch.Tensor:
        cut = tokens * dim // 2 + 4 * dim
        keys, values = cells[..., :cut], cells[..., cut:]
        kv = torch.stack(
            [
                _decode_4_bits(keys, (tokens, dim), (1, dim)),
                _decode_4_bits(values, (tokens, dim), (tokens, 1)),
            ],
            -3,
        )
        return _cells_last(kv.to(dtype))


def _encode_4_bits(x: torch.Tensor, along: int) -> list[torch.Tensor]:
    """Lowest values and steps in bfloat16, then two codes a byte."""
    low, high = torch.aminmax(x, dim=along, keepdim=True)
    low = low.to(torch.bfloat16)
    step = ((high - low.float()) / 15).clamp_(min=SMALLEST).to(torch.bfloat16)
    codes = ((x - low.float()) / step.float()).round_().clamp_(0, 15).to(torch.uint8).flatten(-2)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return [_bytes(low.flatten(-2)), _bytes(step.flatten(-2)), packed]


def _decode_4_bits(
    data: torch.Tensor, shape: tuple[int, int], scales: tuple[int, int]
) -> torch.Tensor:
    count, before = scales[0] * scales[1], data.shape[:-1]
    numbers = data[..., : 4 * count].contiguous().view(torch.bfloat16).float()
    low = numbers[..., :count].reshape(*before, *scales)
    step = numbers[..., count:].reshape(*before, *scales)
    packed = data[..., 4 * count :]
    codes = torch.stack([packed & 15, packed >> 4], -1).reshape(*before, *shape)
    return codes.float().mul_(step).add_(low)


def _cells_first(kv: torch.Tensor) -> torch.Tensor:
    """Keys and values of a head side by side."""
    return kv.transpose(2, 3)


def _cells_last(kv: torch.Tensor) -> torch.Tensor:
    return kv.transpose(2, 3)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Int8(), Int4())}


def find_codec(name: str) -> Codec:
    if name not in CODECS:
        raise unknown_name("transfer.compression", name, ("off", "auto", *CODECS))
    return CODECS[name]


@dataclass(frozen=True, slots=True)
class Staging:
    """How the blocks of a rank lie in a staging region, coded, for one pull."""

    layout: KvLayout
    rank: int
    layers: range
    heads: range
    codec: Codec

    @property
    def block_bytes(self) -> int:
        cell = self.codec.cell_bytes(self.layout.block_tokens, self.layout.head_dim)
        return len(self.layers) * len(self.heads) * cell

    def encode(
        self, memory: torch.Tensor, blocks: list[int], tokens: int, staging: torch.Tensor
    ) -> None:
        """Codes the first `tokens` tokens of the blocks; what lies behind them counts as zero.

        One block at a time, so that what comes up in between stays in the cache.
        """
        behind = len(blocks) * self.layout.block_tokens - tokens
        assert blocks
        assert 0 <= behind < self.layout.block_tokens, (tokens, len(blocks))
        pool = self._select(memory)
        rows = staging[: len(blocks) * self.block_bytes].view(len(blocks), -1)
        for row, block in zip(rows[:-1], blocks[:-1], strict=True):
            row.copy_(self.codec.encode(pool[block : block + 1]).flatten())
        last = pool[blocks[-1] :][:1].clone()
        if behind:
            last[..., -behind:, :] = 0
        rows[-1].copy_(self.codec.encode(last).flatten())

    def decode(self, staging: torch.Tensor, blocks: list[int], memory: torch.Tensor) -> None:
        """Writes coded blocks into a pool of this rank."""
        wanted = len(blocks) * self.block_bytes
        if staging.numel() < wanted:
            raise BadMessage(f"{self.codec.name}: {staging.numel()} bytes of {wanted}")
        pool, layout = self._select(memory), self.layout
        shape, dtype = (layout.block_tokens, layout.head_dim), TORCH_DTYPES[layout.dtype]
        for row, block in zip(staging[:wanted].view(len(blocks), -1), blocks, strict=True):
            cells = row.view(1, len(self.layers), len(self.heads), -1)
            pool[block : block + 1] = self.codec.decode(cells, *shape, dtype)

    def _select(self, memory: torch.Tensor) -> torch.Tensor:
        """The pool as [blocks, layers, 2, heads, tokens, dim], cut to our layers and heads."""
        layout = self.layout
        stage = layout.stage_layers(layout.stage_of_rank(self.rank))
        held = layout.rank_heads(self.rank)
        pool = memory.view(TORCH_DTYPES[layout.dtype]).view(
            -1, len(stage), 2, len(held), layout.block_tokens, layout.head_dim
        )
        layers = slice(self.layers.start - stage.start, self.layers.stop - stage.start)
        heads = slice(self.heads.start - held.start, self.heads.stop - held.start)
        return pool[:, layers, :, heads]
