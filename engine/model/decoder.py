"""One stage of a decoder: token ids or hidden states in, hidden states or logits out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from engine.model.layer import Layer, load_layer
from engine.ops import Rotary

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.kvcache import KvCache
    from engine.model.rope import Rope
    from engine.model.weights import Loader, Norm, Projection
    from engine.ops import Made
    from engine.packing import Packed


class Embedding:
    """Token embeddings, their rows divided among the tensor ranks, and learned positions."""

    def __init__(self, loader: Loader) -> None:
        config, names = loader.config, loader.names
        self.rows = _vocab_share(loader)
        width = config.embedding or config.hidden
        self.table = loader.table(names.embed, config.vocab, width, self.rows)
        self._ops, self._parallel = loader.ops, loader.parallel
        if config.tied and self._parallel.last:
            self.table = self._ops.prepare_weight(self.table)
        self._scale: torch.Tensor | None = None
        if config.embedding_scale is not None:
            self._scale = loader.number(config.embedding_scale)
        self._project: Projection | None = None
        if config.embedding is not None:
            self._project = loader.whole(names.project_in, config.hidden, config.embedding)
        self._positions: torch.Tensor | None = None
        if config.learned_positions is not None:
            count = config.learned_positions
            self._positions = loader.table(names.positions, count, config.hidden, range(count))
        self._position_offset = config.position_offset

    def __call__(self, packed: Packed) -> torch.Tensor:
        hidden = self._look_up(packed.token_ids)
        if self._scale is not None:
            hidden = hidden * self._scale
        if self._project is not None:
            hidden = self._project(hidden)
        if self._positions is not None:
            at = packed.positions + self._position_offset
            hidden = hidden + functional.embedding(at, self._positions)
        return hidden

    def _look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._parallel.tensor_size == 1:
            return self._ops.embed(self.table, token_ids)
        local = token_ids - self.rows.start
        elsewhere = (local < 0) | (local >= len(self.rows))
        hidden = self._ops.embed(self.table, local.masked_fill(elsewhere, 0))
        return self._parallel.add_up(hidden.masked_fill(elsewhere[:, None], 0))


class Head:
    """The final norm and the output matrix, its rows divided among the tensor ranks."""

    def __init__(self, loader: Loader, embedding: Embedding | None) -> None:
        config, names = loader.config, loader.names
        self._ops, self._parallel = loader.ops, loader.parallel
        self._vocab, self._cap = config.vocab, config.logit_soft_cap
        self._norm: Norm | None = loader.norm(names.final_norm) if config.final_norm else None
        width = config.embedding or config.hidden
        self._project: Projection | None = None
        if config.embedding is not None:
            self._project = loader.whole(names.project_out, config.embedding, config.hidden)
        if config.tied and embedding is not None:
            self._table = embedding.table
        else:
            name = names.embed if config.tied else names.head
            table = loader.table(name, config.vocab, width, _vocab_share(loader))
            self._table = self._ops.prepare_weight(table)

    def __call__(self, delta: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """fp32 logits."""
        hidden = residual
        if self._norm is not None:
            hidden = self._norm.after_adding(delta, hidden)
        if self._project is not None:
            hidden = self._project(hidden)
        own = self._ops.logits(self._table, hidden)
        logits = self._parallel.gather_columns(own)[:, : self._vocab]
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits


class Decoder:
    """The layers of this rank's stage, with the embedding before the first and the head after."""

    def __init__(self, loader: Loader, kv: KvCache) -> None:
        self._parallel = loader.parallel
        stage = kv.layout.stage_layers(loader.parallel.stage)
        longest = min(loader.config.max_length, kv.blocks * kv.layout.block_tokens)
        rotaries = _Rotaries(longest, kv.memory.device)
        self._embedding = Embedding(loader) if self._parallel.first else None
        self._layers: dict[int, Layer] = {
            i: load_layer(loader, i, kv.layer(i), rotaries.of(loader.config.layers[i].rope))
            for i in stage
        }
        self._last = next(reversed(self._layers.items()))
        self._before_last = dict(list(self._layers.items())[:-1])
        self._head = Head(loader, self._embedding) if self._parallel.last else None
        self._hidden, self._dtype = loader.config.hidden, loader.dtype
        repeatable = not any(layer.asks_host for layer in self._layers.values())
        alone = repeatable and loader.parallel.tensor_size == 1
        self.whole = alone and loader.parallel.stages == 1
        """Whether `logits_of_step` computes a step without the host and other ranks."""
        together = repeatable and loader.ops.repeats_sums
        self._repeats = loader.ops.repeats() if alone or together else None
        self._ragged = loader.ops.ragged_repeats() if alone else None

    def forward(self, packed: Packed, on_layer: Callable[[int], None]) -> torch.Tensor | None:
        """Logits of the rows that draw, on the last stage; None elsewhere, or if none draws."""
        residual = self._start(packed)
        if (repeated := self._repeat(packed, residual)) is not None:
            for index in self._layers:
                on_layer(index)
            return self._finish(*repeated)
        last_index, last = self._last
        delta, residual = self._run_before_last(packed, residual, on_layer)
        if self._head is not None and packed.draw_rows.shape[0] == 0:
            last.fill(delta, residual, packed)
            self._parallel.await_tensor_ranks(residual.device)
            on_layer(last_index)
            return None
        delta, residual = last(delta, residual, packed, self._kept(packed))
        on_layer(last_index)
        return self._finish(delta, residual)

    def logits_of_step(self, packed: Packed) -> torch.Tensor:
        """Logits of single tokens that all draw, layer by layer."""
        logits = self._finish(*self._all_layers(packed, self._start(packed)))
        assert logits is not None, "not a whole model"
        return logits

    def _repeat(self, packed: Packed, hidden: torch.Tensor) -> Made | None:
        """The layers of a decode step as one call, where that is possible."""
        one_each = packed.draw_rows.shape[0] == len(packed.query_lens) == packed.tokens
        if self._repeats is None or not one_each:
            return None
        return self._repeats.run(self._all_layers, packed, hidden)

    def _run_before_last(
        self, packed: Packed, hidden: torch.Tensor, on_layer: Callable[[int], None]
    ) -> Made:
        if self._ragged is not None:
            made = self._ragged.run(self._before_last, packed, hidden, on_layer)
            if made is not None:
                return made
        delta, residual = None, hidden
        for index, layer in self._before_last.items():
            delta, residual = layer(delta, residual, packed)
            on_layer(index)
        return delta, residual

    def _all_layers(self, packed: Packed, hidden: torch.Tensor) -> Made:
        delta, residual = None, hidden
        for layer in self._layers.values():
            delta, residual = layer(delta, residual, packed)
        return delta, residual

    def _finish(self, delta: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor | None:
        if self._head is not None:
            return self._head(delta, residual)
        self._parallel.hand_on(residual if delta is None else residual + delta)
        return None

    def _kept(self, packed: Packed) -> torch.Tensor | None:
        """Rows the last layer must finish: before the head, only those that draw."""
        all_draw = packed.draw_rows.shape[0] == packed.tokens
        return None if self._head is None or all_draw else packed.draw_rows

    def _start(self, packed: Packed) -> torch.Tensor:
        if self._embedding is not None:
            return self._embedding(packed)
        shape = (packed.tokens, self._hidden)
        empty = torch.empty(shape, dtype=self._dtype, device=packed.token_ids.device)
        return self._parallel.take_over(empty)


class _Rotaries:
    """One table for all layers that turn alike."""

    def __init__(self, longest: int, device: torch.device) -> None:
        self._longest, self._device = longest, device
        self._made: dict[Rope, Rotary] = {}

    def of(self, rope: Rope | None) -> Rotary | None:
        if rope is None:
            return None
        if rope not in self._made:
            self._made[rope] = Rotary(rope.table(self._longest, self._device))
        return self._made[rope]


def _vocab_share(loader: Loader) -> range:
    """Equal shares, the last ones running past the vocabulary if need be."""
    parallel = loader.parallel
    each = -(-loader.config.vocab // parallel.tensor_size)
    return range(parallel.tensor_rank * each, (parallel.tensor_rank + 1) * each)
