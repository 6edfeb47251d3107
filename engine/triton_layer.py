"""What a layer does between its matrices as Triton kernels: norms, activation, RoPE, KV store.

Each kernel reads its rows once and rounds where the plain operations round.
"""

# ruff: noqa: PLR0917  # a kernel takes its pointers and strides by position

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from engine.triton_shared import pool_strides

if TYPE_CHECKING:
    from engine.attention import KvLayer
    from engine.model.config import Activation
    from engine.ops import QkNorm, Rotary
    from engine.packing import Packed

COLUMNS_AT_ONCE = 1024
"""Of an activation, in a program."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_rows(x, x, weight, out, eps, adding=False)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds `x` to `residual` in place and returns the norm of the sum."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_rows(x, residual, weight, out, eps, adding=True)
    return out


def _norm_rows(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    *,
    adding: bool,
) -> None:
    rows, width = x.shape
    assert x.stride(1) == residual.stride(1) == 1
    _norm[(rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        residual.stride(0),
        eps,
        width=width,
        padded_width=triton.next_power_of_2(width),
        adding=adding,
        num_warps=8 if width > COLUMNS_AT_ONCE else 4,
    )


def gated(gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
    """The activation of the first half of each row, times the second."""
    rows, both = gate_up.shape
    width = both // 2
    assert gate_up.is_contiguous()
    out = gate_up.new_empty((rows, width))
    _gate[(rows, triton.cdiv(width, COLUMNS_AT_ONCE))](
        gate_up, out, width, kind=kind.value, columns=COLUMNS_AT_ONCE
    )
    return out


def place_qkv(
    qkv: torch.Tensor,
    kv: KvLayer,
    packed: Packed,
    rotary: Rotary | None,
    qk_norm: QkNorm | None,
) -> torch.Tensor:
    """Norms and turns queries and keys, stores keys and values; the queries, contiguous."""
    tokens, heads = qkv.shape[0], qkv.shape[1] // kv.head_dim - 2 * kv.kv_heads
    query = qkv.new_empty((tokens, heads, kv.head_dim))
    assert qkv.stride(1) == 1
    _place[(tokens,)](
        qkv,
        query,
        kv.key,
        kv.value,
        packed.slots,
        packed.positions,
        qkv if rotary is None else rotary.table,
        qkv if qk_norm is None else qk_norm.query,
        qkv if qk_norm is None else qk_norm.key,
        qkv.stride(0),
        *pool_strides(kv),
        0.0 if qk_norm is None else qk_norm.eps,
        kv.key_scale,
        kv.value_scale,
        heads=heads,
        padded_heads=triton.next_power_of_2(heads),
        kv_heads=kv.kv_heads,
        padded_kv_heads=triton.next_power_of_2(kv.kv_heads),
        dim=kv.head_dim,
        padded_dim=triton.next_power_of_2(kv.head_dim),
        turned_dim=0 if rotary is None else rotary.table.shape[1],
        block_tokens=kv.block_tokens,
        normed=qk_norm is not None,
        most=torch.finfo(kv.key.dtype).max if kv.narrow else None,
    )
    return query


@triton.jit  # type: ignore[untyped-decorator]
def _norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_row: tl.tensor,
    residual_row: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    padded_width: tl.constexpr,
    adding: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, padded_width)
    inside = columns < width
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    if adding:
        places = residual + row * residual_row + columns
        values += tl.load(places, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(places, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    normed = values * scale * tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(out + row * width + columns, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gate(
    gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, kind: tl.constexpr, columns: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + at, mask=inside, other=0.0).to(tl.float32)
    active = _activate(gate, kind)
    tl.store(out + row * width + at, (active * up).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _activate(x: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    if kind == "silu":
        active = x * tl.sigmoid(x)
    elif kind == "gelu":
        active = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif kind == "gelu_tanh":
        active = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(kind == "relu")
        active = tl.maximum(x, 0.0)
    return active


@triton.jit  # type: ignore[untyped-decorator]
def _place(
    qkv: tl.tensor,
    query: tl.tensor,
    key_pool: tl.tensor,
    value_pool: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    turns: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    qkv_row: tl.tensor,
    pool_block: tl.tensor,
    pool_head: tl.tensor,
    pool_token: tl.tensor,
    eps: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    heads: tl.constexpr,
    padded_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    padded_kv_heads: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    turned_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    normed: tl.constexpr,
    most: tl.constexpr,
) -> None:
    """One token: a row of queries, keys and values, head after head."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    turn = turns + tl.load(positions + token) * turned_dim
    row = qkv + token * qkv_row
    dims = tl.arange(0, padded_dim)[None, :]
    head = tl.arange(0, padded_heads)[:, None]
    inside = (head < heads) & (dims < dim)
    queries = _turned(
        row, turn, query_norm, eps, heads, padded_heads, dim, padded_dim, turned_dim, normed
    )
    tl.store(query + (token * heads + head) * dim + dims, queries, mask=inside)
    if slot < 0:
        return
    kv_head = tl.arange(0, padded_kv_heads)[:, None]
    in_pool = (kv_head < kv_heads) & (dims < dim)
    places = slot // block_tokens * pool_block + slot % block_tokens * pool_token
    places = places + kv_head * pool_head + dims
    key, value = row + heads * dim, row + (heads + kv_heads) * dim
    keys = _turned(
        key, turn, key_norm, eps, kv_heads, padded_kv_heads, dim, padded_dim, turned_dim, normed
    )
    keys = _cut(keys, key_scale, most).to(key_pool.dtype.element_ty)
    tl.store(key_pool + places, keys, mask=in_pool)
    values = tl.load(value + kv_head * dim + dims, mask=in_pool, other=0.0)
    values = _cut(values, value_scale, most).to(value_pool.dtype.element_ty)
    tl.store(value_pool + places, values, mask=in_pool)


@triton.jit  # type: ignore[untyped-decorator]
def _cut(values: tl.tensor, scale: tl.tensor, most: tl.constexpr) -> tl.tensor:
    """What 8 bits hold of the values: no more than `most` of their scale; wider ones hold all."""
    cut = values
    if most is not None:
        cut = tl.minimum(tl.maximum(values.to(tl.float32) / scale, -most), most)
    return cut


@triton.jit  # type: ignore[untyped-decorator]
def _turned(
    row: tl.tensor,
    turn: tl.tensor,
    norm: tl.tensor,
    eps: tl.tensor,
    heads: tl.constexpr,
    padded_heads: tl.constexpr,
    dim: tl.constexpr,
    padded_dim: tl.constexpr,
    turned_dim: tl.constexpr,
    normed: tl.constexpr,
) -> tl.tensor:
    """Heads [heads, dims] after their norm and rotation."""
    head = tl.arange(0, padded_heads)[:, None]
    dims = tl.arange(0, padded_dim)[None, :]
    inside = (head < heads) & (dims < dim)
    stored = tl.load(row + head * dim + dims, mask=inside, other=0.0)
    values = stored.to(tl.float32)
    if normed:
        scale = tl.rsqrt(tl.sum(values * values, 1) / dim + eps)[:, None]
        weights = tl.load(norm + dims, mask=dims < dim, other=0.0)
        values = (values * scale * weights).to(stored.dtype).to(tl.float32)
    if turned_dim > 0:
        half: tl.constexpr = turned_dim // 2
        turning = inside & (dims < turned_dim)
        other = tl.where(dims < half, dims + half, dims - half)
        others = tl.load(row + head * dim + other, mask=turning, other=0.0).to(tl.float32)
        if normed:
            weights = tl.load(norm + other, mask=dims < turned_dim, other=0.0)
            others = (others * scale * weights).to(stored.dtype).to(tl.float32)
        angle = tl.where(dims < half, dims, dims - half)
        cosines = tl.load(turn + angle, mask=dims < turned_dim, other=1.0)
        sines = tl.load(turn + half + angle, mask=dims < turned_dim, other=0.0)
        values = values * cosines + tl.where(dims < half, -others, others) * sines
    return values.to(stored.dtype)
