"""The native CPU kernels under the `Ops` seam; plain torch where there are none."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from struct import Struct
from typing import TYPE_CHECKING

import torch

from engine.model.config import Activation
from engine.native_library import load_library
from engine.ops import Ops, TorchOps
from engine.ragged_replay import RaggedReplays
from engine.replay import Replays

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.attention import AttentionShape, KvLayer
    from engine.native_library import Kernels, NativeLibrary
    from engine.ops import QkNorm, Rotary
    from engine.packing import Packed
    from engine.replay import Empty

log = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {Activation.SILU: 0, Activation.GELU_TANH: 1, Activation.RELU: 2}
PANEL_COLUMNS = 32
STEP_ROWS = {torch.float32: 1, torch.bfloat16: 32}
MOST_HEAD_DIM = 512
SLAB_BYTES = 32 << 20
HUGE_PAGE_BYTES = 2 << 20
PAGE_BYTES = 4096

# The records of engine/native/kernels.h: q is an integer or a pointer, d a double.
_PACK = Struct("=6q")
_UNPACK = Struct("=7q")
_LINEAR = Struct("=10q")
_NORM = Struct("=8qd")
_ACTIVATION = Struct("=7q")
_PLACE = Struct("=18qd")
_ATTENTION = Struct("=19q2d")
_HIGHEST = Struct("=6q")


class PackedWeight(torch.Tensor):
    """A weight [out, in] in the kernels' panels; its elements are not where its shape says."""

    # Calls on a subclass are ten times slower unless it declines to intercept them.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001

    pointer: int
    in_features: int
    out_features: int


def cpu_ops(threads: int) -> Ops:
    """The fastest operations this process can run, on `threads` cores of its own."""
    library = load_library()
    if library is None:
        torch.set_num_threads(threads)
        return TorchOps()
    torch.set_num_threads(1)  # a second pool of spinning threads would fight the kernels' own
    ops = NativeOps(library, threads, library.instruction_sets[0])
    log.info("native kernels ready instruction_set=%s threads=%d", ops.instruction_set, threads)
    return ops


def highest(library: NativeLibrary, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `engine.drawing.highest`, of fp32 rows whose elements lie side by side."""
    count, columns = rows.shape
    maxima = torch.empty(count, dtype=torch.float32)
    places = torch.empty(count, dtype=torch.int64)
    library.highest(
        _HIGHEST.pack(
            rows.data_ptr(),
            maxima.data_ptr(),
            places.data_ptr(),
            count,
            columns,
            rows.stride(0),
        )
    )
    return maxima, places


class Slabs:
    """Memory for weights in large pieces, so that the kernel backs them with large pages.

    Each weight begins with a page: a processor prefetches within pages only, and panels that
    straddle them are read a twentieth slower.
    """

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used_bytes = 0

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        size_bytes = rows * columns * dtype.itemsize
        if self._used_bytes + size_bytes > self._slab.numel():
            self._slab = self._new_slab(_round_up(max(size_bytes, SLAB_BYTES), HUGE_PAGE_BYTES))
            self._used_bytes = 0
        piece = self._slab[self._used_bytes : self._used_bytes + size_bytes]
        self._used_bytes += _round_up(size_bytes, PAGE_BYTES)
        return piece.view(dtype).view(rows, columns)

    def _new_slab(self, size_bytes: int) -> torch.Tensor:
        room = torch.empty(size_bytes + HUGE_PAGE_BYTES, dtype=torch.uint8)
        before_bytes = -room.data_ptr() % HUGE_PAGE_BYTES
        slab = room[before_bytes : before_bytes + size_bytes]
        self._library.use_huge_pages(slab.data_ptr(), size_bytes)
        return slab

    def collapse(self, written: torch.Tensor) -> torch.Tensor:
        self._library.collapse_pages(written.data_ptr(), written.nbytes)
        return written


class NativeOps(TorchOps):
    """The compiled kernels; what they do not cover (fp16, exact GELU) plain torch does."""

    name = "native"

    def __init__(self, library: NativeLibrary, threads: int, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        self._library = library
        self._native: Kernels = library
        self._empty: Empty = torch.empty
        self._slabs = Slabs(library)
        library.use(instruction_set, threads)

    def repeats(self) -> Replays | None:
        return Replays(self._library, self.writing_down)

    def ragged_repeats(self) -> RaggedReplays | None:
        return RaggedReplays(self._library, self.writing_down)

    @contextmanager
    def writing_down(self, kernels: Kernels, empty: Empty) -> Iterator[None]:
        """Calls these kernels instead of the library's, and takes memory here, meanwhile."""
        self._native, self._empty = kernels, empty
        try:
            yield
        finally:
            self._native, self._empty = self._library, torch.empty

    def prepare_weight(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype not in DTYPES:
            return self._slabs.collapse(weight.contiguous())
        out_features, in_features = weight.shape
        width = _round_up(in_features, STEP_ROWS[weight.dtype])
        columns = _round_up(out_features, PANEL_COLUMNS)
        room = self._slabs.take(columns, width, weight.dtype)
        packed = room.as_subclass(PackedWeight)
        packed.pointer = room.data_ptr()
        packed.in_features, packed.out_features = in_features, out_features
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self._library.pack(
            _PACK.pack(
                weight.data_ptr(),
                packed.pointer,
                in_features,
                out_features,
                weight.stride(0),
                DTYPES[weight.dtype],
            )
        )
        return packed

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        if not isinstance(table, PackedWeight):
            return super().embed(table, token_ids)
        rows = token_ids.contiguous()
        out = torch.empty((len(rows), table.in_features), dtype=table.dtype)
        record = _UNPACK.pack(
            table.pointer,
            rows.data_ptr(),
            out.data_ptr(),
            len(rows),
            table.in_features,
            table.out_features,
            DTYPES[table.dtype],
        )
        if not self._library.unpack(record):
            raise IndexError(f"token ids must lie in [0, {table.out_features})")
        return out

    def linear(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if x.dtype not in DTYPES:
            return super().linear(weight, x, bias)
        assert isinstance(weight, PackedWeight), weight.dtype
        return self._linear(weight, x, bias, x.dtype)

    def logits(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in DTYPES:
            return super().logits(weight, x)
        assert isinstance(weight, PackedWeight), weight.dtype
        return self._linear(weight, x, None, torch.float32)

    def _linear(
        self,
        weight: PackedWeight,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        rows = x.shape[0]
        out = self._empty((rows, weight.out_features), dtype=out_dtype)
        self._native.linear(
            _LINEAR.pack(
                x.data_ptr(),
                weight.pointer,
                0 if bias is None else bias.data_ptr(),
                out.data_ptr(),
                rows,
                weight.in_features,
                weight.out_features,
                x.stride(0),
                DTYPES[x.dtype],
                int(out_dtype != x.dtype),
            )
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm(x, None, weight, None, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self._norm(x, residual, weight, None, eps)

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return self._norm(x, None, weight, bias, eps)

    def _norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        dtype = DTYPES.get(x.dtype)
        if dtype is None:
            return self._plain_norm(x, residual, weight, bias, eps)
        x = x.contiguous()
        out = self._empty(x.shape, dtype=x.dtype)
        features = x.shape[-1]
        self._native.norm(
            _NORM.pack(
                x.data_ptr(),
                0 if residual is None else residual.data_ptr(),
                weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                out.data_ptr(),
                x.numel() // features,
                features,
                dtype,
                eps,
            )
        )
        return out

    def _plain_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        if bias is not None:
            return super().layer_norm(x, weight, bias, eps)
        if residual is not None:
            residual += x
            x = residual
        return super().rms_norm(x, weight, eps)

    def activate(self, x: torch.Tensor, kind: Activation) -> torch.Tensor:
        if x.dtype not in DTYPES or kind not in ACTIVATIONS:
            return super().activate(x, kind)
        return self._activation(x, x.shape[-1], kind, gated=0)

    def gated(self, gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
        if gate_up.dtype not in DTYPES or kind not in ACTIVATIONS:
            return super().gated(gate_up, kind)
        return self._activation(gate_up, gate_up.shape[-1] // 2, kind, gated=1)

    def _activation(
        self, x: torch.Tensor, features: int, kind: Activation, gated: int
    ) -> torch.Tensor:
        x = x.contiguous()
        out = self._empty((*x.shape[:-1], features), dtype=x.dtype)
        rows = out.numel() // features
        self._native.activation(
            _ACTIVATION.pack(
                x.data_ptr(),
                out.data_ptr(),
                rows,
                features,
                ACTIVATIONS[kind],
                gated,
                DTYPES[x.dtype],
            )
        )
        return out

    def place_qkv(
        self,
        qkv: torch.Tensor,
        kv: KvLayer,
        packed: Packed,
        rotary: Rotary | None,
        qk_norm: QkNorm | None,
    ) -> torch.Tensor:
        if not _covers(qkv, kv):
            return super().place_qkv(qkv, kv, packed, rotary, qk_norm)
        tokens, dim = qkv.shape[0], kv.head_dim
        heads = qkv.shape[1] // dim - 2 * kv.kv_heads
        table = None if rotary is None else rotary.table
        self._native.place(
            _PLACE.pack(
                qkv.data_ptr(),
                *_view(kv),
                packed.positions.data_ptr(),
                packed.slots.data_ptr(),
                0 if table is None else table.data_ptr(),
                0 if qk_norm is None else qk_norm.query.data_ptr(),
                0 if qk_norm is None else qk_norm.key.data_ptr(),
                tokens,
                heads,
                0 if table is None else table.shape[1],
                DTYPES[qkv.dtype],
                0.0 if qk_norm is None else qk_norm.eps,
            )
        )
        return qkv.view(tokens, -1, dim)[:, :heads]

    def paged_attention(
        self, query: torch.Tensor, kv: KvLayer, packed: Packed, shape: AttentionShape
    ) -> torch.Tensor:
        if not _covers(query, kv):
            return super().paged_attention(query, kv, packed, shape)
        tokens, heads, dim = query.shape
        out = self._empty((tokens, heads, dim), dtype=query.dtype)
        self._native.attention(
            _ATTENTION.pack(
                query.data_ptr(),
                out.data_ptr(),
                *_view(kv),
                packed.cu_seqlens.data_ptr(),
                packed.context_lens.data_ptr(),
                packed.block_tables.data_ptr(),
                len(packed.query_lens),
                heads,
                query.stride(0),
                packed.block_tables.stride(0),
                DTYPES[query.dtype],
                shape.window or 0,
                shape.scale,
                shape.soft_cap or 0.0,
            )
        )
        return out


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _covers(heads: torch.Tensor, kv: KvLayer) -> bool:
    """Whether the kernels read this cache: in the model's own dtype, heads of a sane size."""
    return heads.dtype in DTYPES and kv.key.dtype == heads.dtype and kv.head_dim <= MOST_HEAD_DIM


def _view(kv: KvLayer) -> tuple[int, ...]:
    block, head, token, _ = kv.key.stride()
    return (
        kv.key.data_ptr(),
        kv.value.data_ptr(),
        block,
        head,
        token,
        kv.block_tokens,
        kv.kv_heads,
        kv.head_dim,
    )
