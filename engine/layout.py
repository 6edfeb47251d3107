"""Where the KV of a token lies: the one description that engine, transfers and plans share.

A rank's pool is one contiguous piece of memory, block after block. Inside a block:

    [layer of this stage][key, value][kv head of this rank][token of the block][head dim]

so one block of all layers is one contiguous piece, and so is any run of heads of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The KV shape of one instance: a model cut over `pipeline` stages of `tensor` ranks."""

    model: str
    """Fingerprint of the checkpoint; KV of another model is never accepted."""
    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def stage_of_rank(self, rank: int) -> int:
        return rank // self.tensor_parallel

    def stage_layers(self, stage: int) -> range:
        """Layers of a stage; the first stages take one more when they do not divide."""
        share, extra = divmod(self.layers, self.pipeline_parallel)
        start = stage * share + min(stage, extra)
        return range(start, start + share + (stage < extra))

    def rank_heads(self, rank: int) -> range:
        """KV heads of a rank; with fewer heads than tensor ranks, neighbours hold the same one."""
        tensor_rank = rank % self.tensor_parallel
        if self.kv_heads >= self.tensor_parallel:
            share = self.kv_heads // self.tensor_parallel
            return range(tensor_rank * share, (tensor_rank + 1) * share)
        head = tensor_rank * self.kv_heads // self.tensor_parallel
        return range(head, head + 1)

    @property
    def head_bytes(self) -> int:
        """One head's keys (or values) of one layer in one block."""
        return self.block_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    def layer_bytes(self, rank: int) -> int:
        """One layer of one block on a rank, keys and values."""
        return 2 * len(self.rank_heads(rank)) * self.head_bytes

    def block_bytes(self, rank: int) -> int:
        return len(self.stage_layers(self.stage_of_rank(rank))) * self.layer_bytes(rank)

    @property
    def instance_block_bytes(self) -> int:
        """One block over all ranks."""
        return sum(self.block_bytes(rank) for rank in range(self.ranks))

    def offset(self, rank: int, block: int, layer: int, *, value: bool, head: int) -> int:
        """Byte offset in the rank's pool of a head's keys or values of one layer in one block."""
        stage = self.stage_layers(self.stage_of_rank(rank))
        heads = self.rank_heads(rank)
        assert layer in stage, (rank, layer)
        assert head in heads, (rank, head)
        return (
            block * self.block_bytes(rank)
            + (layer - stage.start) * self.layer_bytes(rank)
            + (len(heads) * int(value) + head - heads.start) * self.head_bytes
        )

    def layer_groups(self, stage: int, groups: int) -> tuple[range, ...]:
        """A stage's layers cut into at most `groups` runs, the units of an overlapped pull."""
        layers = self.stage_layers(stage)
        groups = min(groups, len(layers))
        bounds = [layers.start + len(layers) * g // groups for g in range(groups + 1)]
        return tuple(range(a, b) for a, b in pairwise(bounds))
