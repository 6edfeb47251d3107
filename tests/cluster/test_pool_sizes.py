"""How many blocks a worker makes of the memory that it may take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.config import parse_config
from cluster.instance.borrowed_weights import weigh
from cluster.instance.rank import CPU_KV_BYTES, CPU_KV_TOKENS, GPU_WORKSPACE_BYTES, count_blocks
from cluster.profiling import one_rank
from cluster.roster import InstanceSpec
from engine.checkpoint import open_checkpoint
from engine.errors import BadConfig
from engine.messages import Role
from engine.parallel import ALONE, Parallel

CHECKPOINT = open_checkpoint("demo")
LAYOUT = CHECKPOINT.layout(block_tokens=16, dtype="bfloat16")
WEIGHTS = weigh(CHECKPOINT, ALONE, CHECKPOINT.config.dtype).nbytes
TOTAL = 4 << 30


def config(**engine: object) -> object:
    many = {"decode": {"max_sequences": 1_000_000}}  # so that memory is what bounds the pool
    return parse_config({"engine": many | engine})


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, TOTAL))


def test_a_gpus_pool_is_what_weights_and_room_to_work_leave_of_its_share():
    for kv_share, gpu_share in ((0.9, 1.0), (0.9, 0.5), (1.0, 0.4)):
        wanted = int(TOTAL * gpu_share * kv_share) - WEIGHTS - GPU_WORKSPACE_BYTES
        blocks = count_blocks(config(kv_share=kv_share), CHECKPOINT, LAYOUT, "cuda", gpu_share)
        assert blocks == wanted // LAYOUT.block_bytes(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_count_in_the_dtype_that_they_are_held_in(dtype):
    held = weigh(CHECKPOINT, ALONE, dtype).nbytes
    blocks = count_blocks(config(dtype=dtype), CHECKPOINT, LAYOUT, "cuda")
    assert blocks == (int(TOTAL * 0.9) - held - GPU_WORKSPACE_BYTES) // LAYOUT.block_bytes(0)


def test_every_rank_counts_the_weights_of_the_one_that_holds_most():
    cut = CHECKPOINT.layout(block_tokens=16, dtype="bfloat16", pipeline_parallel=3)
    places = [Parallel(stage=stage, stages=3) for stage in range(3)]
    parts = [weigh(CHECKPOINT, place, "bfloat16").nbytes for place in places]
    blocks = count_blocks(config(dtype="bfloat16"), CHECKPOINT, cut, "cuda")
    room = int(TOTAL * 0.9) - max(parts) - GPU_WORKSPACE_BYTES
    assert max(parts) > min(parts)
    assert blocks == room // max(cut.block_bytes(rank) for rank in range(3))


def test_weights_that_workers_share_are_borne_in_parts():
    half = {"resources": {"GPU": 0.5}}
    many = {"decode": {"max_sequences": 1_000_000}, "share_weights": True}
    settings = parse_config({"engine": many, "pools": {"prefill": half, "decode": half}})
    wanted = int(TOTAL * 0.5 * 0.9) - int(WEIGHTS * 0.5) - GPU_WORKSPACE_BYTES
    blocks = count_blocks(settings, CHECKPOINT, LAYOUT, "cuda", 0.5)
    assert blocks == wanted // LAYOUT.block_bytes(0)


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(BadConfig, match=r"engine\.kv_bytes"):
        count_blocks(config(), CHECKPOINT, LAYOUT, "cuda", 0.1)


@pytest.mark.parametrize(("device", "gpu_share"), [("cpu", 1.0), ("cuda", 0.5)])
def test_a_size_that_is_given_is_what_a_worker_takes(device, gpu_share):
    blocks = count_blocks(config(kv_bytes=50 << 20), CHECKPOINT, LAYOUT, device, gpu_share)
    assert blocks == (50 << 20) // LAYOUT.block_bytes(0)


def test_a_cpu_takes_room_for_so_many_tokens_within_a_bound():
    assert count_blocks(config(), CHECKPOINT, LAYOUT, "cpu") == CPU_KV_TOKENS // 16
    long = replace(CHECKPOINT, config=replace(CHECKPOINT.config, max_length=2 * CPU_KV_TOKENS))
    assert count_blocks(config(), long, LAYOUT, "cpu") == 2 * CPU_KV_TOKENS // 16
    wide = replace(LAYOUT, kv_heads=64 * LAYOUT.kv_heads)
    assert count_blocks(config(), CHECKPOINT, wide, "cpu") == CPU_KV_BYTES // wide.block_bytes(0)


@pytest.mark.parametrize(
    ("resources", "share"),
    [((), 1.0), ((("GPU", 0.5),), 0.5), ((("CPU", 0.1), ("GPU", 2.0)), 1.0)],
)
def test_a_worker_has_the_part_of_a_gpu_that_its_resources_say(resources, share):
    spec = InstanceSpec("decode-0", Role.DECODE, "cuda", resources=resources)
    assert spec.gpu_share == share


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_profiled_rank_counts_weights_in_the_dtype_that_is_profiled(dtype, monkeypatch):
    """As on a GPU, whose memory is so little that it bounds the pool."""
    total = 2 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, total))
    monkeypatch.setattr(
        one_rank, "count_blocks", lambda *given: count_blocks(*given[:-1], device="cuda")
    )
    rank = one_rank.Rank(one_rank.RankSettings("demo", dtype=dtype), most_kv_bytes=16 << 20)
    rank.runner.close()
    room = int(total * 0.9) - weigh(CHECKPOINT, ALONE, dtype).nbytes - GPU_WORKSPACE_BYTES
    tokens = room // rank.layout.block_bytes(0) * rank.layout.block_tokens
    assert rank.description["kv_capacity_tokens"] == tokens
