"""How a checkpoint of 8-bit floats says that it stores the factors of its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.model.fields import Fields

METHODS = ("fp8", "compressed-tensors")
COMPRESSED = "float-quantized"


@dataclass(frozen=True, slots=True)
class Scaling:
    suffix: str
    """What follows the name of a matrix in that of its factors."""
    block: tuple[int, int] | None
    """Outputs and inputs that share a factor; without, a row or the whole matrix does."""


def read_scaling(fields: Fields) -> Scaling | None:
    """What `quantization_config` says; None where weights are stored as they are."""
    if "quantization_config" not in fields:
        return None
    said = fields.part("quantization_config")
    method = said.text("quant_method", "")
    if method not in METHODS:
        raise said.bad("quant_method", f"must be one of {', '.join(METHODS)}")
    if method == "fp8" and "weight_block_size" in said:
        return Scaling("_scale_inv", said.pair("weight_block_size"))
    if method == "compressed-tensors" and said.text("format", "") != COMPRESSED:
        raise said.bad("format", f"must be {COMPRESSED}")
    return Scaling("_scale", None)
