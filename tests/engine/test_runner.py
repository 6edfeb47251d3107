"""The runner's contract beyond the tokens: groups of layers, memory, dtypes."""

from __future__ import annotations

import logging
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.errors import BadConfig
from engine.kvcache import KvCache
from engine.layout import KvLayout
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.driving import Greedy, chunk, step

if TYPE_CHECKING:
    from collections.abc import Callable

LAYOUT = KvLayout("m", layers=4, kv_heads=2, head_dim=8, block_tokens=4, dtype="float32")
CPU = torch.device("cpu")


@pytest.fixture
def runner(tiny_checkpoint: Callable[[str], Path]) -> Runner:
    checkpoint = open_checkpoint(str(tiny_checkpoint("gemma3")))
    return Runner(checkpoint, sampler=Greedy(), blocks=8, block_tokens=4, layer_groups=4)


def test_layer_groups_are_told_once_their_kv_is_in_the_pool(runner: Runner) -> None:
    def keys_written(layers: range) -> list[bool]:
        return [bool(runner.kv.layer(layer).key[5].any()) for layer in layers]

    groups = runner.layout.layer_groups(0, 4)
    seen: list[int] = []

    def on_layer_group(group: int) -> None:
        assert all(keys_written(groups[group]))
        assert not any(keys_written(range(groups[group].stop, 6)))
        seen.append(group)

    runner.execute(Batch((chunk("a", (5, 6, 7), 0, (5,)),)), on_layer_group)
    assert seen == [0, 1, 2, 3]


def test_a_batch_in_which_nothing_draws_gives_nothing(runner: Runner) -> None:
    result = runner.execute(Batch((chunk("a", (5, 6, 7), 0, (5,), draw=False),)))
    assert result.drawn == ()
    assert runner.execute(Batch()).drawn == ()


def test_drawn_tokens_name_their_requests_in_the_batchs_order(runner: Runner) -> None:
    batch = Batch(
        (
            chunk("b", (5, 6), 0, (1,)),
            chunk("c", (9,), 0, (2,), draw=False),
            chunk("a", (7,), 0, (3,)),
        )
    )
    assert [drawn.request_id for drawn in runner.execute(batch).drawn] == ["b", "a"]


def test_the_pool_lies_in_memory_as_the_layout_says(runner: Runner) -> None:
    step(runner, chunk("a", (5, 6, 7), 0, (5,)))
    kv, layout = runner.kv, runner.layout
    for layer, value, head in ((0, False, 0), (3, True, 1), (5, False, 1)):
        start = layout.offset(0, 5, layer, value=value, head=head)
        raw = kv.memory[start : start + layout.head_bytes].view(torch.float32)
        here = kv.layer(layer).value if value else kv.layer(layer).key
        assert raw.any()
        assert torch.equal(raw.view(4, layout.head_dim), here[5, head])


def test_another_process_may_map_the_pool() -> None:
    kv = KvCache(LAYOUT, 0, blocks=3, device=CPU)
    kv.layer(2).value[1, 1, 3, 7] = 2.5
    assert kv.fd is not None
    with Path(f"/proc/self/fd/{kv.fd}").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert mapped[:] == kv.memory.numpy().tobytes()
    assert any(mapped)
    mapped.close()
    kv.close()
    assert kv.fd is None


def test_a_cache_of_no_blocks_is_refused() -> None:
    with pytest.raises(BadConfig, match="blocks"):
        KvCache(LAYOUT, 0, blocks=0, device=CPU)


def test_float16_becomes_bfloat16_on_a_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.make("llama3", tmp_path, dtype="float16")
    with caplog.at_level(logging.INFO, "engine.runner"):
        runner = Runner(open_checkpoint(str(tmp_path)), sampler=Greedy(), blocks=2)
    assert runner.layout.dtype == "bfloat16"
    assert "using bfloat16" in caplog.text


def test_an_unknown_dtype_is_refused(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint("llama3")))
    with pytest.raises(BadConfig, match="dtype"):
        Runner(checkpoint, sampler=Greedy(), blocks=2, dtype="int8")
