"""Weights go from their files straight into their places, and a watcher sees how far they are."""

from __future__ import annotations

import multiprocessing
import resource
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_checkpoint
from engine.errors import BadCheckpoint
from engine.parallel import Parallel
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.driving import Greedy, generate
from tests.engine.ranks import leading

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

BLOCKS = (7, 3, 11, 0, 14, 5, 9, 2)
STEPS = 8
MIB = 1 << 20
MAPPED_MIB = 160
"""Pages of the files that may be mapped at once, a piece of working memory, and the cache."""


def load(directory: Path, **options: object) -> Runner:
    checkpoint = open_checkpoint(str(directory))
    return Runner(checkpoint, sampler=Greedy(), blocks=16, block_tokens=4, **options)  # type: ignore[arg-type]


def stack_experts(directory: Path, target: Path) -> Path:
    """The same checkpoint with all experts of a layer in one tensor each, as transformers 5 has."""
    target.mkdir()
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    save_file(stacked(tensors), target / "model.safetensors")
    return target


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            layer, _, rest = name.partition(".experts.")
            number, part, _ = rest.split(".")
            experts.setdefault(layer, {}).setdefault(int(number), {})[part] = tensor
    for layer, numbered in experts.items():
        root = layer.replace("block_sparse_moe", "mlp") + ".experts."
        each = [numbered[number] for number in sorted(numbered)]
        gates, ups, downs = (
            torch.stack([parts.get(new, parts.get(old)) for parts in each])  # type: ignore[misc]
            for new, old in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        )
        plain |= {root + "gate_up_proj": torch.cat([gates, ups], dim=1), root + "down_proj": downs}
    return {name.replace("block_sparse_moe.gate", "mlp.gate"): t for name, t in plain.items()}


with_experts = pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-mixed", "mixtral"])


@with_experts
def test_stacked_experts_are_the_same_model(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny_checkpoint(name)
    other = stack_experts(directory, tmp_path / "stacked")
    assert not any(".experts.0." in name for name in load_file(other / "model.safetensors"))
    wanted = generate(load(directory), tiny.prompt(20), STEPS, BLOCKS)
    assert generate(load(other), tiny.prompt(20), STEPS, BLOCKS) == wanted


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_transformers_own_stacked_spelling_loads(name: str, tmp_path: Path) -> None:
    model = tiny.make(name, tmp_path / "each")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = load_file(tmp_path / "stacked" / "model.safetensors")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    wanted = generate(load(tmp_path / "each"), tiny.prompt(20), STEPS, BLOCKS)
    assert generate(load(tmp_path / "stacked"), tiny.prompt(20), STEPS, BLOCKS) == wanted


@pytest.mark.parametrize(("tensor_size", "stages"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_ranks_cut_stacked_experts_alike(
    name: str,
    tensor_size: int,
    stages: int,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    other = stack_experts(tiny_checkpoint(name), tmp_path / "stacked")
    wanted = generate(load(tiny_checkpoint(name)), tiny.prompt(20), STEPS, BLOCKS)
    with leading(other, tmp_path / "meet", tensor_size=tensor_size, stages=stages) as led:
        executor, _ = led
        assert generate(executor, tiny.prompt(20), STEPS, BLOCKS) == wanted
        executor.close()


def test_stacked_experts_of_the_wrong_number_are_named(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    other = stack_experts(tiny_checkpoint("mixtral"), tmp_path / "stacked")
    path = other / "model.safetensors"
    fewer = {n: t[:-1] if t.dim() == 3 else t for n, t in load_file(path).items()}
    save_file({name: tensor.contiguous() for name, tensor in fewer.items()}, path)
    with pytest.raises(BadCheckpoint) as refused:
        load(other)
    assert refused.value.field == "model.layers.0.mlp.experts.gate_up_proj"
    assert refused.value.rule == "must be of shape [4, 96, 32]"


@pytest.mark.parametrize("name", tiny.TINY)
def test_progress_counts_every_byte_up_to_the_last(
    name: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    told: list[tuple[int, int]] = []
    load(tiny_checkpoint(name), progress=lambda done, total: told.append((done, total)))
    done, totals = [done for done, _ in told], {total for _, total in told}
    assert done == sorted(set(done))
    assert totals == {done[-1]}
    assert done[-1] == sum(
        t.nbytes for t in load_file(tiny_checkpoint(name) / "model.safetensors").values()
    )


@pytest.mark.parametrize("parallel", [Parallel(tensor_size=2), Parallel(stages=2)])
def test_a_rank_is_told_of_its_own_part(
    parallel: Parallel, tiny_checkpoint: Callable[[str], Path]
) -> None:
    whole: list[tuple[int, int]] = []
    part: list[tuple[int, int]] = []
    load(tiny_checkpoint("llama3"), progress=lambda *at: whole.append(at))
    load(tiny_checkpoint("llama3"), parallel=parallel, progress=lambda *at: part.append(at))
    assert part[-1][0] == part[-1][1] < 0.7 * whole[-1][1]


def grown_mib(directory: Path, parallel: Parallel, report: Callable[[float], None]) -> None:
    """How far memory rose at its highest while a rank loaded; runs in a process of its own."""
    load(directory.parent / "small")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load(directory, parallel=parallel)
    report((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


@pytest.mark.parametrize(
    "parallel",
    [Parallel(), Parallel(tensor_size=2), Parallel(stages=2)],
    ids=["alone", "half of each", "half of the layers"],
)
def test_memory_at_its_highest_is_the_ranks_weights_once(parallel: Parallel, large: Path) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=grown_mib, args=(large, parallel, sender.send))
    process.start()
    process.join(60)
    weights_mib = (large / "model.safetensors").stat().st_size / MIB
    mine_mib = weights_mib / (parallel.tensor_size * parallel.stages)
    assert (
        receiver.recv()
        < mine_mib + MAPPED_MIB
        < 2 * weights_mib / (parallel.tensor_size * parallel.stages)
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that a second copy of a half of it would stand out."""
    root = tmp_path_factory.mktemp("large")
    tiny.make("llama3", root / "small")
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    tiny.make("llama3", root / "large", **wide)
    return root / "large"
