"""One decoder layer: attention over the paged cache, then an MLP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.attention import AttentionShape
from engine.model.mlp import Experts, load_mlp
from engine.model.weights import Loader, Norm, Part, Projection
from engine.ops import QkNorm

if TYPE_CHECKING:
    import torch

    from engine.attention import KvLayer
    from engine.model.mlp import Mlp
    from engine.ops import Rotary
    from engine.packing import Packed
    from engine.parallel import Parallel


@dataclass(slots=True)
class Attention:
    qkv: Projection
    output: Projection
    shape: AttentionShape
    rotary: Rotary | None
    qk_norm: QkNorm | None
    kv: KvLayer

    def __call__(self, x: torch.Tensor, packed: Packed, keep: torch.Tensor | None) -> torch.Tensor:
        """The rows `keep` of the result; all of them when None."""
        query = self.place(x, packed)
        attended = self.qkv.ops.paged_attention(query, self.kv, packed, self.shape)
        attended = attended.view(x.shape[0], -1)
        return self.output(attended if keep is None else attended[keep])

    def place(self, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Stores the new keys and values; the queries."""
        qkv = self.qkv(x)
        return self.qkv.ops.place_qkv(qkv, self.kv, packed, self.rotary, self.qk_norm)


@dataclass(slots=True)
class Layer:
    """`residual` is the running sum, added to in place; `delta` is what is not yet in it."""

    attention: Attention
    mlp: Mlp | Experts
    attention_norm: Norm
    mlp_norm: Norm
    after_attention_norm: Norm | None
    after_mlp_norm: Norm | None
    norm_first: bool
    parallel: Parallel

    @property
    def asks_host(self) -> bool:
        """Whether the host must see what was computed before it can go on."""
        return isinstance(self.mlp, Experts)

    def __call__(
        self,
        delta: torch.Tensor | None,
        residual: torch.Tensor,
        packed: Packed,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Only the rows `keep` go on past the attention, where the others are not needed."""
        if not self.norm_first:
            return None, self._norm_last(residual, packed, keep)
        normed = self.attention_norm.after_adding(delta, residual)
        delta = self._attend(normed, packed, keep)
        if self.after_attention_norm is not None:
            delta = self.after_attention_norm(delta)
        residual = residual if keep is None else residual[keep]
        delta = self._think(self.mlp_norm.after_adding(delta, residual))
        if self.after_mlp_norm is not None:
            delta = self.after_mlp_norm(delta)
        return delta, residual

    def fill(self, delta: torch.Tensor | None, residual: torch.Tensor, packed: Packed) -> None:
        """Stores the layer's keys and values where nothing after them is needed."""
        x = self.attention_norm.after_adding(delta, residual) if self.norm_first else residual
        self.attention.place(x, packed)

    def _norm_last(
        self, hidden: torch.Tensor, packed: Packed, keep: torch.Tensor | None
    ) -> torch.Tensor:
        attended = self._attend(hidden, packed, keep)
        hidden = hidden if keep is None else hidden[keep]
        hidden = self.attention_norm.after_adding(attended, hidden)
        return self.mlp_norm.after_adding(self._think(hidden), hidden)

    def _attend(self, x: torch.Tensor, packed: Packed, keep: torch.Tensor | None) -> torch.Tensor:
        return self.parallel.add_up(self.attention(x, packed, keep))

    def _think(self, x: torch.Tensor) -> torch.Tensor:
        return self.parallel.add_up(self.mlp(x))


def load_layer(loader: Loader, layer: int, kv: KvLayer, rotary: Rotary | None) -> Layer:
    config, names = loader.config, loader.names

    def norm(name: str) -> Norm:
        return loader.norm(names.in_layer(layer, name))

    return Layer(
        _load_attention(loader, layer, kv, rotary),
        load_mlp(loader, layer),
        norm(names.attention_norm),
        norm(names.mlp_norm),
        norm(names.after_attention_norm) if config.sandwich else None,
        norm(names.after_mlp_norm) if config.sandwich else None,
        config.norm_first,
        loader.parallel,
    )


def _load_attention(loader: Loader, layer: int, kv: KvLayer, rotary: Rotary | None) -> Attention:
    config, names = loader.config, loader.names
    if kv.narrow:
        kv = _with_scales(loader, layer, kv)
    here = config.layers[layer]
    return Attention(
        _load_qkv(loader, layer, kv),
        loader.by_input(
            names.in_layer(layer, names.output),
            config.hidden,
            config.heads * config.head_dim,
            biased=config.output_bias,
            transposed=names.transposed,
        ),
        AttentionShape(here.attention_scale, here.window, config.attention_soft_cap),
        rotary,
        _load_qk_norm(loader, layer) if config.qk_norm else None,
        kv,
    )


def _with_scales(loader: Loader, layer: int, kv: KvLayer) -> KvLayer:
    """Those that the checkpoint was calibrated with, as different tools call them."""
    names = loader.names

    def scale(letter: str, projection: str) -> float:
        block = projection.rpartition(".")[0]
        owners = (block, block + ".attn", projection)
        return loader.scale([names.in_layer(layer, f"{one}.{letter}_scale") for one in owners])

    return replace(kv, key_scale=scale("k", names.key), value_scale=scale("v", names.value))


def _load_qkv(loader: Loader, layer: int, kv: KvLayer) -> Projection:
    """Queries of this rank's heads, then keys and values of the KV heads they share."""
    config, names, parallel = loader.config, loader.names, loader.parallel
    dim = config.head_dim
    heads = loader.share(config.heads)
    first = parallel.tensor_rank * config.kv_heads // parallel.tensor_size
    kv_take = range(first * dim, (first + kv.kv_heads) * dim)
    kv_outputs = config.kv_heads * dim
    parts = [
        Part(
            names.in_layer(layer, names.query),
            config.heads * dim,
            range(heads.start * dim, heads.stop * dim),
        ),
        Part(names.in_layer(layer, names.key), kv_outputs, kv_take),
        Part(names.in_layer(layer, names.value), kv_outputs, kv_take),
    ]
    return loader.by_output(
        parts, config.hidden, biased=config.qkv_bias, transposed=names.transposed
    )


def _load_qk_norm(loader: Loader, layer: int) -> QkNorm:
    config, names = loader.config, loader.names
    query, key = (
        loader.norm(names.in_layer(layer, name), config.head_dim)
        for name in (names.query_norm, names.key_norm)
    )
    return QkNorm(query.weight, key.weight, config.norm_eps)
