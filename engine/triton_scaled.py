"""Products with matrices of 8-bit floats, which are read as they are and widened on the way."""

# ruff: noqa: PLR0917  # a kernel takes its pointers and strides by position

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from engine.triton_shared import LEAST_ROWS

if TYPE_CHECKING:
    import torch

    from engine.scaled import ScaledWeight

MOST_ROWS, INPUTS, OUTPUTS = 128, 128, 64
"""Of the tile that a program multiplies at once."""


def can_multiply(weight: ScaledWeight) -> bool:
    """Whether each tile of inputs falls within one run."""
    run = weight.run_inputs
    return run % min(run & -run, INPUTS) == 0 and run & -run >= LEAST_ROWS


def linear(weight: ScaledWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows, inputs = x.shape
    outputs, runs = weight.factors.shape
    assert x.stride(1) == 1
    out = x.new_empty((rows, outputs))
    run = weight.run_inputs
    tile_rows = min(MOST_ROWS, max(LEAST_ROWS, triton.next_power_of_2(rows)))
    _multiply[(triton.cdiv(outputs, OUTPUTS), triton.cdiv(rows, tile_rows))](
        x,
        weight.weight,
        weight.factors,
        x if bias is None else bias,
        out,
        rows,
        outputs,
        inputs,
        runs,
        x.stride(0),
        run=run,
        tile_rows=tile_rows,
        tile_outputs=OUTPUTS,
        tile_inputs=min(run & -run, INPUTS),
        biased=bias is not None,
        num_warps=8 if tile_rows == MOST_ROWS else 4,
    )
    return out


@triton.jit(do_not_specialize=("rows",))  # type: ignore[untyped-decorator]
def _multiply(
    x: tl.tensor,
    weight: tl.tensor,
    factors: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    runs: tl.tensor,
    x_row: tl.tensor,
    run: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
    biased: tl.constexpr,
) -> None:
    output = tl.program_id(0).to(tl.int64) * tile_outputs + tl.arange(0, tile_outputs)
    row = tl.program_id(1).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    wanted, present = output < outputs, row < rows
    total = tl.zeros((tile_rows, tile_outputs), tl.float32)
    for start in range(0, inputs, tile_inputs):
        at = start + tl.arange(0, tile_inputs)
        left = tl.load(x + row[:, None] * x_row + at[None, :], mask=present[:, None], other=0.0)
        right = tl.load(
            weight + output[:, None] * inputs + at[None, :], mask=wanted[:, None], other=0.0
        )
        factor = tl.load(factors + output * runs + start // run, mask=wanted, other=0.0)
        product = tl.dot(left, tl.trans(right.to(left.dtype)), input_precision="ieee")
        total += product * factor[None, :]
    if biased:
        total += tl.load(bias + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    places = out + row[:, None] * outputs + output[None, :]
    inside = present[:, None] & wanted[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=inside)
