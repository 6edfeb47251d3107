"""The half of a layer that follows attention: dense, or a choice of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.model.weights import Loader, Part, Plane, Projection

if TYPE_CHECKING:
    from engine.model.config import Activation, MoeConfig


@dataclass(slots=True)
class Mlp:
    up: Projection
    """Gate and up fused, where the model has a gate."""
    down: Projection
    activation: Activation
    gated: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide, ops = self.up(x), self.up.ops
        if self.gated:
            return self.down(ops.gated(wide, self.activation))
        return self.down(ops.activate(wide, self.activation))


@dataclass(slots=True)
class Experts:
    """Each token goes through the few experts its router weighs highest."""

    router: Projection
    experts: list[Mlp]
    config: MoeConfig

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self._route(x)
        order = chosen.flatten().argsort(stable=True)
        grouped = x[order // self.config.experts_per_token]
        counts = chosen.flatten().bincount(minlength=self.config.experts).tolist()
        outputs = torch.empty_like(grouped)
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                outputs[start : start + count] = expert(grouped[start : start + count])
                start += count
        scattered = torch.empty_like(outputs)
        scattered[order] = outputs
        each = scattered.view(*chosen.shape, -1)
        return (each * weights[..., None]).sum(1)

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and numbers of each token's experts, [tokens, experts_per_token]."""
        likely = self.router(x).softmax(-1, dtype=torch.float32)
        weights, chosen = likely.topk(self.config.experts_per_token, dim=-1)
        if self.config.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen


def load_mlp(loader: Loader, layer: int) -> Mlp | Experts:
    config, names = loader.config, loader.names
    if config.layers[layer].moe:
        return _load_experts(loader, layer)
    gate, up, down = (names.in_layer(layer, name) for name in (names.gate, names.up, names.down))
    return _load_dense(loader, (gate, up, down), config.intermediate, biased=config.mlp_bias)


def _load_experts(loader: Loader, layer: int) -> Experts:
    names, moe = loader.names, loader.config.moe
    assert moe is not None, "a layer of experts in a model without any"
    if names.in_layer(layer, names.stacked_gate_up) in loader:
        return _load_stacked(loader, layer, moe)
    parts = (names.expert_gate, names.expert_up, names.expert_down)
    experts = []
    for expert in range(moe.experts):
        gate, up, down = (names.in_expert(layer, expert, part) for part in parts)
        experts.append(_load_dense(loader, (gate, up, down), moe.intermediate, biased=False))
    router = names.in_layer(layer, names.router)
    return Experts(loader.whole(router, moe.experts, loader.config.hidden), experts, moe)


def _load_stacked(loader: Loader, layer: int, moe: MoeConfig) -> Experts:
    """Experts that lie in one tensor each for gate and up, and for down."""
    names = loader.names
    gate_up = names.in_layer(layer, names.stacked_gate_up)
    parts = (gate_up, gate_up, names.in_layer(layer, names.stacked_down))
    experts = [
        _load_dense(loader, parts, moe.intermediate, biased=False, plane=Plane(index, moe.experts))
        for index in range(moe.experts)
    ]
    router = names.in_layer(layer, names.stacked_router)
    return Experts(loader.whole(router, moe.experts, loader.config.hidden), experts, moe)


def _load_dense(
    loader: Loader,
    names: tuple[str, str, str],
    width: int,
    *,
    biased: bool,
    plane: Plane | None = None,
) -> Mlp:
    config, share = loader.config, loader.share(width)
    stored = names[:2] if config.gated else names[1:2]
    turned = loader.names.transposed
    parts = [Part(name, width, share) for name in stored]
    return Mlp(
        loader.by_output(parts, config.hidden, biased=biased, transposed=turned, plane=plane),
        loader.by_input(
            names[2], config.hidden, width, biased=biased, transposed=turned, plane=plane
        ),
        config.activation,
        config.gated,
    )
