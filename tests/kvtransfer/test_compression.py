"""What compression keeps, what it costs, and when it pays."""

from __future__ import annotations

import pytest
import torch

from engine.errors import BadConfig, BadMessage
from engine.layout import KvLayout
from kvtransfer.coding import CodingSpeed, break_even_Bps, choose_coding, transfer_s
from kvtransfer.compression import (
    CODECS,
    Staging,
    find_codec,
)

BOUND = {"int8": 0.006, "int4": 0.08}
"""Largest error of normally distributed values, relative to the largest value of a cell."""


def layout(dtype="bfloat16", tensor=1):
    return KvLayout("toy", 4, 4, 32, 8, dtype, tensor)


def random_pool(shape, rank, blocks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = {"bfloat16": torch.bfloat16, "float32": torch.float32}[shape.dtype]
    count = blocks * shape.block_bytes(rank) // width.itemsize
    return torch.randn(count, generator=generator).to(width).view(torch.uint8)


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_decoded_is_close_to_what_was_encoded(name, dtype):
    shape = layout(dtype)
    staging = Staging(shape, 0, range(4), range(4), find_codec(name))
    source, target = random_pool(shape, 0, 5), torch.zeros_like(random_pool(shape, 0, 5))
    wire = torch.zeros(3 * staging.block_bytes, dtype=torch.uint8)
    staging.encode(source, [4, 0, 2], 24, wire)
    staging.decode(wire, [1, 2, 0], target)
    sent, got = (
        staging._select(source)[[4, 0, 2]].float(),
        staging._select(target)[[1, 2, 0]].float(),
    )
    peak = sent.abs().amax((-1, -2), keepdim=True)
    rounding = 1 / 256 if dtype == "bfloat16" else 0
    assert ((sent - got).abs() / peak).max() < BOUND[name] + rounding
    assert not staging._select(target)[3:].any()


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_rank_with_other_layers_and_heads_decodes_its_share_exactly_alike(name):
    whole, half = layout(), layout(tensor=2)
    codec = find_codec(name)
    source = random_pool(whole, 0, 2)
    cut = Staging(whole, 0, range(1, 3), range(2, 4), codec)
    wire = torch.zeros(2 * cut.block_bytes, dtype=torch.uint8)
    cut.encode(source, [0, 1], 16, wire)
    target = torch.zeros(2 * half.block_bytes(1), dtype=torch.uint8)
    Staging(half, 1, range(1, 3), range(2, 4), codec).decode(wire, [0, 1], target)
    alone = torch.zeros_like(source)
    cut.decode(wire, [0, 1], alone)
    got = Staging(half, 1, range(1, 3), range(2, 4), codec)._select(target)
    assert torch.equal(got, cut._select(alone))


@pytest.mark.parametrize("name", sorted(CODECS))
def test_rubbish_behind_the_last_token_does_not_spoil_the_scale(name):
    shape = layout("float32")
    staging = Staging(shape, 0, range(4), range(4), find_codec(name))
    clean = random_pool(shape, 0, 1)
    staging._select(clean)[..., 5:, :] = 0
    dirty = clean.clone()
    staging._select(dirty)[..., 5:, :] = float("nan")
    wires = [torch.zeros(staging.block_bytes, dtype=torch.uint8) for _ in range(2)]
    for pool, wire in zip((clean, dirty), wires, strict=True):
        staging.encode(pool, [0], 5, wire)
    assert torch.equal(*wires)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_zeros_and_constants_survive(name):
    shape = layout("float32")
    staging = Staging(shape, 0, range(4), range(4), find_codec(name))
    pool = torch.zeros(2 * shape.block_bytes(0), dtype=torch.uint8)
    staging._select(pool)[1] = 3.0
    wire = torch.zeros(2 * staging.block_bytes, dtype=torch.uint8)
    staging.encode(pool, [0, 1], 16, wire)
    result = torch.ones_like(pool)
    staging.decode(wire, [0, 1], result)
    assert torch.allclose(staging._select(result), staging._select(pool))


@pytest.mark.parametrize("name", sorted(CODECS))
def test_cells_are_as_large_as_they_say(name):
    codec = find_codec(name)
    cells = codec.encode(torch.zeros(1, 1, 2, 1, 16, 128))
    assert cells.shape[-1] == codec.cell_bytes(16, 128)


def test_a_short_staging_region_is_refused():
    staging = Staging(layout(), 0, range(4), range(4), find_codec("int8"))
    with pytest.raises(BadMessage, match="int8: 10 bytes of"):
        staging.decode(torch.zeros(10, dtype=torch.uint8), [0], random_pool(layout(), 0, 1))


def test_an_unknown_codec_is_bad_config():
    with pytest.raises(BadConfig, match="did you mean 'int8'"):
        find_codec("int88")


def test_compression_pays_on_links_slower_than_the_break_even():
    speed = CodingSpeed(ratio=0.5, encode_Bps=1e9, decode_Bps=1e9)
    assert break_even_Bps(speed) == pytest.approx(0.25e9)
    assert choose_coding("int8", 10**9, 0.2e9, {"int8": speed}).codec == "int8"
    assert choose_coding("int8", 10**9, 0.3e9, {"int8": speed}).codec is None
    assert transfer_s(10**9, 1e9, speed) == pytest.approx(2.5)


def test_auto_takes_the_codec_that_makes_the_pull_shortest():
    speeds = {"int8": CodingSpeed(0.5, 1e9, 1e9), "int4": CodingSpeed(0.3, 0.5e9, 0.5e9)}
    assert choose_coding("auto", 10**8, 1e7, speeds).codec == "int4"
    assert choose_coding("auto", 10**8, 0.2e9, speeds).codec == "int8"
    declined = choose_coding("auto", 10**8, 1e9, speeds)
    assert declined.codec is None
    assert declined.why == "100000000 bytes at 1000 MB/s take 100.0 ms, by int8 250.0 ms"


def test_nothing_is_coded_for_a_link_of_which_nothing_is_known():
    speeds = {"int8": CodingSpeed(0.5, 1e9, 1e9)}
    assert choose_coding("int8", 10**8, None, speeds).codec is None
