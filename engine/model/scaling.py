"""How a checkpoint of 8-bit floats stores the factors of its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch

from engine.errors import BadCheckpoint

if TYPE_CHECKING:
    from engine.model.fields import Fields
    from engine.tensors import TensorFiles

METHODS = ("fp8", "compressed-tensors")
COMPRESSED = "float-quantized"
STORED, STORED_NAME = torch.float8_e4m3fn, "F8_E4M3"
"""As torch and as safetensors call it."""


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


def factors_of(
    tensors: TensorFiles,
    name: str,
    scaling: Scaling,
    shape: tuple[int, int],
    cut: tuple[range, range],
) -> torch.Tensor:
    """fp32 [outputs, runs] for a part of the matrix `name`, which is of `shape` as a whole."""
    stored = tensors.whole(name + scaling.suffix).float()
    rows, columns = scaling.block or (1 if stored.numel() > 1 else shape[0], shape[1])
    grid = (-(-shape[0] // rows), -(-shape[1] // columns))
    if stored.numel() != grid[0] * grid[1]:
        rule = f"must hold {grid[0]} x {grid[1]} factors"
        raise BadCheckpoint(name + scaling.suffix, list(stored.shape), rule)
    outputs, inputs = cut
    run = gcd(columns, inputs.start, len(inputs))
    of_rows = torch.arange(outputs.start, outputs.stop) // rows
    of_runs = torch.arange(inputs.start, inputs.stop, run) // columns
    return stored.view(grid)[of_rows][:, of_runs]
