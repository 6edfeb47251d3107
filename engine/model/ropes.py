"""How config.json writes a rotation, in its older and newer spelling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from engine.model.rope import Linear, Llama3, LongRope, Rope, Yarn

if TYPE_CHECKING:
    from engine.model.fields import Fields

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")


def read_rope(fields: Fields, head_dim: int, longest: int | None, *, sliding: bool = False) -> Rope:
    """The rotation of the full-attention layers, or of the sliding ones where they differ."""
    rope = _newer(fields, sliding=sliding) or _older(fields, sliding=sliding)
    dims = int(head_dim * rope.number("partial_rotary_factor", 1.0))
    return Rope(rope.number("rope_theta"), dims, _scaling(rope, dims, longest))


def _newer(fields: Fields, *, sliding: bool) -> Fields | None:
    """`rope_parameters` holds everything, for each kind of layer apart where they differ."""
    if "rope_parameters" not in fields:
        return None
    rope = fields.part("rope_parameters")
    kind = "sliding_attention" if sliding else "full_attention"
    rope = rope.part(kind) if kind in rope else rope
    return rope.over(_common(fields, sliding=sliding))


def _older(fields: Fields, *, sliding: bool) -> Fields:
    """`rope_theta` beside `rope_scaling`; the sliding layers' own base is never scaled."""
    common = _common(fields, sliding=sliding)
    return common if sliding else fields.part("rope_scaling").over(common)


def _common(fields: Fields, *, sliding: bool) -> Fields:
    """Defaults, and what older configs keep outside the rope's own object."""
    local = fields.number("rope_local_base_freq", 10_000.0)
    usual = 1_000_000.0 if fields.text("model_type").startswith("gemma3") else 10_000.0
    length = fields.integer("max_position_embeddings", 2048)
    values = {
        "rope_theta": local if sliding else fields.number("rope_theta", usual),
        "partial_rotary_factor": fields.number("partial_rotary_factor", 1.0),
        "original_max_position_embeddings": fields.integer(
            "original_max_position_embeddings", length
        ),
        "max_position_embeddings": length,
    }
    return fields.derived("rope_parameters", values)


def _scaling(
    rope: Fields, dims: int, longest: int | None
) -> Linear | Llama3 | Yarn | LongRope | None:
    kind = rope.text("rope_type", rope.text("type", "default"))
    original = rope.integer("original_max_position_embeddings")
    match kind:
        case "default" | "dynamic":
            # Dynamic scaling changes nothing up to the model's length, and nothing longer runs.
            return None
        case "linear":
            return Linear(rope.number("factor"))
        case "llama3":
            return Llama3(
                rope.number("factor"),
                rope.number("low_freq_factor"),
                rope.number("high_freq_factor"),
                original,
            )
        case "yarn":
            return _yarn(rope, original)
        case "longrope" | "su":
            return _longrope(rope, dims, original, longest)
    raise rope.bad("rope_type", f"must be one of {', '.join(SCALINGS)}")


def _yarn(rope: Fields, original: int) -> Yarn:
    factor = rope.number("factor", rope.integer("max_position_embeddings") / original)
    attention = rope.optional_number("attention_factor")
    if attention is None:
        attention = _yarn_attention(rope, factor)
    return Yarn(
        factor,
        original,
        attention,
        rope.number("beta_fast", 32.0),
        rope.number("beta_slow", 1.0),
        rope.flag("truncate", default=True),
    )


def _yarn_attention(rope: Fields, factor: float) -> float:
    def growth(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if "mscale" in rope and "mscale_all_dim" in rope:
        return growth(rope.number("mscale")) / growth(rope.number("mscale_all_dim"))
    return growth(1.0)


def _longrope(rope: Fields, dims: int, original: int, longest: int | None) -> LongRope:
    length = rope.integer("max_position_embeddings")
    attention = rope.optional_number("attention_factor")
    if attention is None:
        factor = rope.number("factor", length / original)
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    name = "long_factor" if (longest or length) > original else "short_factor"
    return LongRope(rope.numbers(name, dims // 2), attention)
