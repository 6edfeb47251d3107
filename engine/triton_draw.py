"""One token a row from its logits, and the rows made ready for their next step, on the device.

Draws as `engine.drawing` does, by inverse CDF with one number keyed by (seed, position): rows are
surveyed in tiles, then a program for each row joins its tiles and looks into the one where the
CDF crosses. A device and a host differ only where a draw falls within rounding of the border
between two tokens.
"""

# ruff: noqa: PLR0917  # a kernel takes its pointers and strides by position

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from engine.device_rows import DeviceRows

TILE = 1024
"""Logits that a program of the survey looks at."""


def place_rows(rows: DeviceRows, count: int, block_tokens: int) -> None:
    """Where the first `count` rows store their next token, and how much context each then has."""
    _place_rows[(count,)](
        rows.present,
        rows.positions,
        rows.tables,
        rows.slots,
        rows.contexts,
        rows.tables.stride(0),
        block_tokens=block_tokens,
    )


def draw_rows(logits: torch.Tensor, rows: DeviceRows, vocabulary: int) -> None:
    """Draws from the leading `vocabulary` logits of each row, and moves the row on by a token."""
    count, tiles = logits.shape[0], triton.cdiv(vocabulary, TILE)
    assert logits.stride(1) == 1
    surveyed = [logits.new_empty((count, tiles), dtype=torch.float32) for _ in range(3)]
    highest = torch.empty((count, tiles), dtype=torch.int64, device=logits.device)
    _survey[(count, tiles)](
        logits, rows.heats, *surveyed, highest, logits.stride(0), vocabulary, tile=TILE
    )
    _draw[(count,)](
        logits,
        *surveyed,
        highest,
        rows.present,
        rows.token_ids,
        rows.positions,
        rows.places,
        rows.seeds,
        rows.heats,
        rows.drawn,
        rows.sound,
        logits.stride(0),
        vocabulary,
        tiles,
        tile=TILE,
        padded_tiles=triton.next_power_of_2(tiles),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _place_rows(
    present: tl.tensor,
    positions: tl.tensor,
    tables: tl.tensor,
    slots: tl.tensor,
    contexts: tl.tensor,
    table_row: tl.tensor,
    block_tokens: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    here = tl.load(present + row) != 0
    position = tl.load(positions + row)
    block = tl.load(tables + row * table_row + position // block_tokens).to(tl.int64)
    slot = block * block_tokens + position % block_tokens
    tl.store(slots + row, tl.where(here, slot, -1))
    tl.store(contexts + row, tl.where(here, position + 1, 0).to(tl.int32))


@triton.jit  # type: ignore[untyped-decorator]
def _survey(
    logits: tl.tensor,
    heats: tl.tensor,
    peaks: tl.tensor,
    weights: tl.tensor,
    sounds: tl.tensor,
    highest: tl.tensor,
    logits_row: tl.tensor,
    vocabulary: tl.tensor,
    tile: tl.constexpr,
) -> None:
    """A tile's peak and the first token that has it, and what its tokens weigh beside the peak."""
    row, number = tl.program_id(0), tl.program_id(1)
    at = number * tile + tl.arange(0, tile)
    inside = at < vocabulary
    values = tl.load(logits + row.to(tl.int64) * logits_row + at, mask=inside, other=float("-inf"))
    sound = values < float("inf")  # neither infinite nor NaN
    values = tl.where(sound, values, float("-inf"))
    peak = tl.max(values, 0)
    place = row * tl.num_programs(1) + number
    tl.store(peaks + place, peak)
    tl.store(sounds + place, tl.min(sound.to(tl.float32), 0))
    tl.store(highest + place, tl.min(tl.where(values == peak, at, vocabulary), 0).to(tl.int64))
    heat = tl.load(heats + row).to(tl.float32)
    level = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(weights + place, tl.sum(_weights(values, level, heat), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _weights(values: tl.tensor, level: tl.tensor, heat: tl.tensor) -> tl.tensor:
    """What each value weighs beside `level`; a row without heat weighs nothing."""
    warm = heat > 0.0
    return tl.where(warm, tl.exp((values - level) / tl.where(warm, heat, 1.0)), 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _draw(
    logits: tl.tensor,
    peaks: tl.tensor,
    weights: tl.tensor,
    sounds: tl.tensor,
    highest: tl.tensor,
    present: tl.tensor,
    token_ids: tl.tensor,
    positions: tl.tensor,
    places: tl.tensor,
    seeds: tl.tensor,
    heats: tl.tensor,
    drawn: tl.tensor,
    sound: tl.tensor,
    logits_row: tl.tensor,
    vocabulary: tl.tensor,
    tiles: tl.tensor,
    tile: tl.constexpr,
    padded_tiles: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    number = tl.arange(0, padded_tiles)
    here, own = number < tiles, row * tiles + number
    peak = tl.load(peaks + own, mask=here, other=float("-inf"))
    top = tl.max(peak, 0)
    first = tl.load(highest + own, mask=here, other=0)
    token = tl.min(tl.where(here & (peak == top), first, vocabulary), 0)
    heat = tl.load(heats + row).to(tl.float32)
    finite = top > float("-inf")
    place = tl.load(places + row)
    if (heat > 0.0) & finite:
        uniform = _uniform(tl.load(seeds + row), place)
        weight = tl.load(weights + own, mask=here, other=0.0)
        weight = (weight * _weights(peak, top, heat)).to(tl.float64)
        crossing = uniform * tl.sum(weight, 0)
        chosen = _crossed(weight, crossing, padded_tiles)
        before = tl.sum(tl.where(number < chosen, weight, 0.0), 0)
        at = chosen * tile + tl.arange(0, tile)
        values = tl.load(
            logits + row.to(tl.int64) * logits_row + at, mask=at < vocabulary, other=float("-inf")
        )
        inner = _weights(values, top, heat).to(tl.float64)
        token = (chosen * tile + _crossed(inner, crossing - before, tile)).to(tl.int64)
    sounds_of = tl.load(sounds + own, mask=here, other=1.0)
    tl.store(drawn + row, token)
    tl.store(sound + row, (finite & (tl.min(sounds_of, 0) > 0.0)).to(tl.int64))
    moved = tl.load(present + row)
    tl.store(token_ids + row, token * moved)
    tl.store(positions + row, tl.load(positions + row) + moved)
    tl.store(places + row, place + moved)


@triton.jit  # type: ignore[untyped-decorator]
def _crossed(weights: tl.tensor, crossing: tl.tensor, count: tl.constexpr) -> tl.tensor:
    """The first index up to which more than `crossing` weighs: never past the last that weighs."""
    index = tl.sum((tl.cumsum(weights, 0) <= crossing).to(tl.int32), 0)
    return tl.minimum(index, tl.max(tl.where(weights > 0.0, tl.arange(0, count), 0), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _uniform(seed: tl.tensor, place: tl.tensor) -> tl.tensor:
    """The number of engine.random's `uniforms`: Philox-4x32-10 of the place under the seed."""
    low, high = (place & 0xFFFFFFFF).to(tl.uint32), (place >> 32).to(tl.uint32)
    zero = low ^ low
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = ((first >> 5).to(tl.uint64) << 26) | (second >> 6).to(tl.uint64)
    return bits.to(tl.float64) * 1.1102230246251565e-16
