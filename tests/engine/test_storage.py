"""Weights in one piece of memory: who loads them, and who finds them there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.errors import InstanceLost
from engine.kvcache import KvCache
from engine.model.loading import RankWeights
from engine.model.storage import ALIGNED_BYTES, Measured, OnePiece
from engine.ops import TorchOps
from engine.parallel import ALONE, Parallel
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.driving import Greedy, chunk, generate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.model.loading import Weighed
    from engine.model.storage import Storage

FAMILIES = ("llama2", "qwen3", "qwen3-moe", "mixtral", "gemma2", "opt-350m", "gpt2")


def runner_of(directory: Path, storage: Storage | None = None) -> Runner:
    checkpoint = open_checkpoint(str(directory))
    return Runner(checkpoint, sampler=Greedy(), blocks=4, ops=TorchOps(), storage=storage)


def weigh(
    directory: Path, parallel: Parallel = ALONE, dtype: torch.dtype = torch.float32
) -> Weighed:
    checkpoint = open_checkpoint(str(directory))
    layout = checkpoint.layout(
        block_tokens=16,
        dtype="float32",
        tensor_parallel=parallel.tensor_size,
        pipeline_parallel=parallel.stages,
    )
    kv = KvCache(layout, parallel.rank, blocks=1, device=torch.device("cpu"))
    weighed = RankWeights(checkpoint, parallel, dtype, kv).weigh()
    kv.close()
    return weighed


def nothing() -> None: ...


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_found_where_another_has_loaded_them(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    directory = tiny_checkpoint(family)
    piece = torch.empty(weigh(directory).nbytes, dtype=torch.uint8)
    own = runner_of(directory)
    loading = runner_of(directory, OnePiece(piece, nothing, filled=False))
    loaded = piece.clone()
    finding = runner_of(directory, OnePiece(piece, nothing, filled=True))
    batch = Batch((chunk("a", tiny.prompt(20), 0, (2, 0)),))
    wanted = own.logits(batch)
    assert wanted is not None
    for runner in (loading, finding):
        found = runner.logits(batch)
        assert found is not None
        assert torch.equal(found, wanted)
    assert torch.equal(piece, loaded)
    for runner in (own, loading, finding):
        runner.close()


def test_who_finds_weights_reads_no_file(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_checkpoint("llama2")
    piece = torch.empty(weigh(directory).nbytes, dtype=torch.uint8)
    runner_of(directory, OnePiece(piece, nothing, filled=False)).close()
    read: list[str] = []
    files = open_checkpoint(str(directory)).tensors
    monkeypatch.setattr(type(files), "read", lambda _files, name, _cut, _into: read.append(name))
    runner_of(directory, OnePiece(piece, nothing, filled=True)).close()
    assert read == ["model.embed_tokens.weight"], "the fingerprint's sample alone"


def test_other_parts_and_other_numbers_have_other_names(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    directory = tiny_checkpoint("llama2")
    weighed = [
        weigh(directory),
        weigh(directory, dtype=torch.bfloat16),
        weigh(directory, Parallel(tensor_size=2)),
        weigh(directory, Parallel(stages=2)),
        weigh(tiny_checkpoint("gemma2")),
    ]
    assert len({one.order for one in weighed}) == len(weighed)
    assert weigh(directory) == weighed[0]


def test_what_was_computed_from_weights_that_are_gone_does_not_count(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    directory = tiny_checkpoint("llama2")
    piece = torch.empty(weigh(directory).nbytes, dtype=torch.uint8)
    runner_of(directory, OnePiece(piece, nothing, filled=False)).close()
    gone: list[str] = []

    def check_alive() -> None:
        if gone:
            raise InstanceLost(gone[0])

    runner = runner_of(directory, OnePiece(piece, check_alive, filled=True))
    assert len(generate(runner, tiny.prompt(5), 2, range(4))) == 2
    gone.append("nobody keeps the weights")
    with pytest.raises(InstanceLost, match="nobody keeps"):
        generate(runner, tiny.prompt(5), 1, range(4))
    runner.close()


def test_every_tensor_begins_where_any_number_may() -> None:
    piece = torch.zeros(3 * ALIGNED_BYTES, dtype=torch.uint8)
    storage, measured = OnePiece(piece, nothing, filled=False), Measured()
    for shape, dtype in (((3, 5), torch.uint8), ((2,), torch.float64), ((1, 1), torch.bfloat16)):
        taken = storage.take(shape, dtype)
        assert (tuple(taken.shape), taken.dtype) == (shape, dtype)
        assert (taken.data_ptr() - piece.data_ptr()) % ALIGNED_BYTES == 0
        assert measured.take(shape, dtype).is_meta
    assert measured.nbytes == piece.numel()
    with pytest.raises(AssertionError):
        storage.take((1,), torch.uint8)
