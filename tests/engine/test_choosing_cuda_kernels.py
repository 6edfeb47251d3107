"""What a CUDA device attends with, as far as that can be told without one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch

import tests.engine.triton_here  # noqa: F401  # before the kernels
from engine import attention, runner, varlen_attention
from engine import cuda_ops as module
from engine.attention import AttentionShape
from engine.cuda_ops import CudaOps
from engine.varlen_attention import case_of
from tests.engine.attending import Scene, scene

if TYPE_CHECKING:
    from collections.abc import Iterator

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def batch() -> Scene:
    return scene(4, 2, 32, 16, spans=((1, 20), (3, 4)), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, module.__name__):
        yield


def test_each_kind_of_layer_is_settled_and_told_once(
    batch: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    ops = CudaOps(attention.paged_attention)
    query = batch.query.contiguous()
    for shape in (AttentionShape(0.2), AttentionShape(0.2, window=8)):
        wanted = attention.paged_attention(query, batch.kv, batch.packed, shape)
        for _ in range(2):
            assert torch.equal(ops.paged_attention(query, batch.kv, batch.packed, shape), wanted)
    chosen = [record.getMessage() for record in caplog.records]
    assert len(chosen) == 2
    reason = varlen_attention.missing_from_torch() or "varlen_attn runs on CUDA, not cpu"
    assert all(f"backend=triton reason={reason}" in line for line in chosen)


def test_torchs_kernels_attend_where_nothing_speaks_against_them(
    batch: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(varlen_attention, "paged_attention", attention.paged_attention)
    ops = CudaOps(refuse, lambda case, device: None)
    query = batch.query.contiguous()
    ops.paged_attention(query, batch.kv, batch.packed, AttentionShape(0.2))
    assert "backend=varlen_attn" in caplog.text


def refuse(*_: object) -> torch.Tensor:
    raise AssertionError


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (AttentionShape(0.2, soft_cap=5.0), torch.bfloat16, "no soft cap"),
        (AttentionShape(0.2), torch.float32, "no torch.float32 over a cache of torch.bfloat16"),
    ],
)
def test_what_torchs_kernels_never_take_is_known_without_trying(
    batch: Scene,
    shape: AttentionShape,
    dtype: torch.dtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(varlen_attention, "missing_from_torch", lambda: None)
    case = case_of(batch.query.to(dtype), batch.kv, shape)
    assert reason in str(varlen_attention.why_not(case, GPU))


@pytest.mark.parametrize("window", [None, 7, 4096])
def test_kernels_are_taken_only_if_a_small_batch_comes_out_right(
    batch: Scene, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(batch.query, batch.kv, AttentionShape(0.2, window=window))
    monkeypatch.setattr(varlen_attention, "paged_attention", attention.paged_attention)
    assert varlen_attention._try(case, CPU) is None

    def blind_to_windows(query, kv, packed, shape):
        return attention.paged_attention(query, kv, packed, AttentionShape(0.2))

    monkeypatch.setattr(varlen_attention, "paged_attention", blind_to_windows)
    wrong = None if window is None else "varlen_attn attended wrongly over blocks of 16 tokens"
    assert varlen_attention._try(case, CPU) == wrong


def test_kernels_that_refuse_our_blocks_are_passed_over(
    batch: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_blocks(*_: object) -> torch.Tensor:
        raise RuntimeError("page size must be a multiple of 256\nand a trace")

    monkeypatch.setattr(varlen_attention, "paged_attention", refuse_blocks)
    assert varlen_attention._try(case_of(batch.query, batch.kv, AttentionShape(0.2)), CPU) == (
        "varlen_attn refused blocks of 16 tokens: page size must be a multiple of 256"
    )


def test_without_triton_plain_torch_computes_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    assert runner.cuda_ops().name == "torch"
    assert "reason=Triton is not installed" in caplog.text


def test_a_gpu_that_is_given_without_a_number_is_the_one_that_the_process_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As workers are told of theirs; torch sets no device that has no number."""
    entered: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", entered.append, raising=False)
    for device in (GPU, torch.device("cuda", 1)):
        assert runner.choose_ops(device, 1, deterministic=False).name == "cuda"
    assert entered == [1]
