"""A roofline: how long any model takes on any catalog device, before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from engine.errors import BadConfig
from engine.layout import DTYPE_BYTES
from placement.latency.model import LatencyModel

if TYPE_CHECKING:
    from placement.latency.catalog import Device, Link
    from placement.latency.model_shape import ModelShape

SHARPNESS = 3.0
"""Where compute and memory balance, a kernel takes longer than either: (c^p + m^p)^(1/p)."""
MOST_FIXED = 65_536
"""Sizes of passes whose cost is kept."""
ACTIVATION_PASSES = 8
"""Times a layer's small kernels read or write the hidden state."""


@dataclass(frozen=True)
class Roofline(LatencyModel):
    """Compute, memory and collectives of a model cut over tensor ranks and pipeline stages."""

    shape: ModelShape
    device: Device
    link: Link
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    pipeline_link: Link | None = None

    def __post_init__(self) -> None:
        if not self.shape.splits_into(self.tensor_parallel, self.pipeline_parallel):
            field = f"{self.shape.name} parallelism"
            value = f"{self.tensor_parallel}x{self.pipeline_parallel}"
            raise BadConfig(field, value, "heads or the MLP do not divide, or a stage has no layer")

    def cut(self, tensor_parallel: int, pipeline_parallel: int) -> Roofline:
        """The same model and device at another parallelism."""
        return replace(self, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)

    @cached_property
    def pair_s(self) -> float:
        """Flash attention: two multiply-adds per head dimension and pair."""
        flops = 4 * self.shape.layers * self.shape.heads * self.shape.head_dim
        peak = self.device.bf16_flops * self.device.attention
        return flops / self.tensor_parallel / peak

    @cached_property
    def read_s(self) -> float:
        """A KV token read once by its rank, or the arithmetic on it if that takes longer."""
        shape, device = self.shape, self.device
        heads = shape.kv_heads_of_rank(self.tensor_parallel)
        size = 2 * heads * shape.head_dim * DTYPE_BYTES[shape.kv_dtype]
        memory_s = size / (device.memory_bytes_per_s * device.memory)
        flops = 4 * shape.heads * shape.head_dim / self.tensor_parallel
        return shape.layers * max(memory_s, flops / (device.bf16_flops * device.attention))

    def fixed_s(self, tokens: int, draws: int) -> float:
        key = tokens, draws
        known = self._fixed.get(key)
        if known is None:
            if len(self._fixed) >= MOST_FIXED:
                self._fixed.clear()
            known = self._fixed[key] = self._fixed_s(tokens, draws)
        return known

    def flops(self, tokens: int, draws: int) -> float:
        """Of the weights, per device."""
        shape = self.shape
        layers = shape.matrix_parameters(shape.active_experts)
        layers += shape.expert_layers * shape.router_parameters
        total = tokens * layers + draws * shape.hidden * shape.vocabulary
        return 2 * total / (self.tensor_parallel * self.pipeline_parallel)

    def weight_bytes_read(self, tokens: int) -> float:
        """Per device; a batch touches only some experts."""
        shape = self.shape
        layers = shape.matrix_parameters(self.experts_touched(tokens)) * shape.matrix_bytes_each
        rest = shape.expert_layers * shape.router_parameters + shape.hidden * shape.vocabulary
        total = layers + rest * shape.weight_bytes_each
        return total / (self.tensor_parallel * self.pipeline_parallel)

    def experts_touched(self, tokens: int) -> float:
        """Distinct experts, expected, if tokens choose evenly."""
        experts, active = self.shape.experts, self.shape.active_experts
        return experts * (1 - (1 - active / experts) ** tokens)

    def matrix_s(self, rows: int, parameters: float, read_bytes: float) -> float:
        """`rows` times a matrix, of which so much comes from memory; multiplied in the model's own
        floats, even where it is stored in narrower ones."""
        device = self.device
        fp8 = device.fp8_flops if self.shape.weight_bytes_each == 1 else None
        compute_s = 2 * rows * parameters / ((fp8 or device.bf16_flops) * device.compute)
        memory_s = read_bytes / (device.memory_bytes_per_s * device.memory)
        return float((compute_s**SHARPNESS + memory_s**SHARPNESS) ** (1 / SHARPNESS))

    @cached_property
    def _fixed(self) -> dict[tuple[int, int], float]:
        """What has been worked out of `fixed_s`."""
        return {}

    def _layer_s(self, tokens: int, computed: float, read: float) -> float:
        """With so many parameters of its feed-forward computed with for each token, and read."""
        shape, tensor = self.shape, self.tensor_parallel
        each = shape.matrix_bytes_each
        query_value = shape.attention_parameters / 2 / tensor
        hidden_bytes = tokens * shape.hidden * 2
        small_s = ACTIVATION_PASSES * hidden_bytes / self.device.memory_bytes_per_s
        return (
            2 * self.matrix_s(tokens, query_value, query_value * each)
            + self.matrix_s(tokens, computed / tensor, read / tensor * each)
            + small_s
            + self.device.layer_overhead_s
            + 2 * self.link.all_reduce_s(hidden_bytes, tensor)
        )

    def _layers_s(self, tokens: int) -> float:
        """Those with experts, or alike where there are none, and those without."""
        shape = self.shape
        active = shape.active_experts * shape.expert_parameters
        touched = self.experts_touched(tokens) * shape.expert_parameters
        layers_s = shape.expert_layers * self._layer_s(tokens, active, touched)
        if shape.dense_layers:
            dense = shape.dense_parameters
            layers_s += shape.dense_layers * self._layer_s(tokens, dense, dense)
        return layers_s

    def _fixed_s(self, tokens: int, draws: int) -> float:
        shape = self.shape
        head = shape.hidden * shape.vocabulary / self.tensor_parallel
        head_s = self.matrix_s(draws, head, head * shape.weight_bytes_each)
        between = self.pipeline_link or self.link
        sends_s = (self.pipeline_parallel - 1) * between.transfer_s(tokens * shape.hidden * 2)
        return self._layers_s(tokens) + head_s + sends_s + self.device.step_overhead_s


def power_w(device: Device, compute_share: float, memory_share: float) -> float:
    """Drawn at these shares of peak: bandwidth alone does not reach the limit, arithmetic does."""
    active = min(1.0, compute_share + MEMORY_POWER_SHARE * memory_share)
    return device.idle_w + (device.power_w - device.idle_w) * active


MEMORY_POWER_SHARE = 0.5
