"""Runs batches on one rank: swaps, one forward pass over the paged cache, and the draws."""

from __future__ import annotations

import ctypes
import logging
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch

from engine.batch import StepResult
from engine.clock import SystemClock
from engine.errors import BadConfig
from engine.kernels import NativeOps, cpu_ops
from engine.kvcache import TORCH_DTYPES, KvCache
from engine.layer_reports import DeviceReports, LayerReports
from engine.model.loading import RankWeights
from engine.model.storage import OwnPieces
from engine.ops import TorchOps
from engine.packing import pack
from engine.parallel import ALONE, Parallel
from engine.rowwise import RowwiseOps
from engine.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from engine.batch import Batch, Collect, Draw, Drawn, Launch
    from engine.checkpoint import Checkpoint
    from engine.clock import Clock
    from engine.layout import KvLayout
    from engine.model.storage import Storage
    from engine.ops import Ops, WholeSteps
    from engine.whole_steps import Launched

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_PIECE_BYTES, KEPT_BYTES = 32 << 20, 64 << 20
MAPPED_BYTES = 1 << 20
"""What passes through memory while weights are loaded would leave gaps in the heap."""


class Draws(Protocol):
    """What turns logits into tokens: engine.sampler's Sampler, or a greedy one in tests."""

    def sample(
        self, logits: torch.Tensor, draws: Sequence[Draw], request_ids: Sequence[str]
    ) -> list[Drawn]: ...


def resolve_dtype(wanted: str, saved: str, device: torch.device) -> str:
    """`auto` is what the checkpoint was saved in, but never float16 on a CPU."""
    dtype = saved if wanted == "auto" else wanted
    if dtype not in ("float32", "bfloat16", "float16"):
        raise BadConfig("dtype", wanted, "must be auto, float32, bfloat16 or float16")
    if dtype == "float16" and device.type == "cpu":
        log.info("float16 is ten times slower than bfloat16 on a CPU: using bfloat16")
        return "bfloat16"
    return dtype


def resolve_kv_dtype(wanted: str, dtype: str, device: torch.device) -> str:
    """`auto` is the model's own; a CPU's kernels read no other."""
    if wanted == "auto":
        return dtype
    if wanted != "float8_e4m3fn":
        raise BadConfig("kv_dtype", wanted, "must be auto or float8_e4m3fn")
    if device.type == "cpu":
        raise BadConfig("kv_dtype", wanted, "is for GPUs: on a CPU it must be auto")
    return wanted


def choose_ops(device: torch.device, threads: int, *, deterministic: bool) -> Ops:
    """The fastest operations for a device; `deterministic` ones do not mix a batch's rows."""
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        return RowwiseOps() if deterministic else cuda_ops()
    ops = cpu_ops(threads)
    repeatable = isinstance(ops, NativeOps)
    return RowwiseOps() if deterministic and not repeatable else ops


def cuda_ops() -> Ops:
    """Our kernels; plain torch, with a warning, where Triton is not installed."""
    if find_spec("triton") is None:
        log.warning("computing in plain torch on a GPU reason=Triton is not installed")
        return TorchOps()
    from engine.cuda_ops import CudaOps

    return CudaOps()


@contextmanager
def _gapless_heap(device: torch.device) -> Iterator[None]:
    """Has glibc map each larger piece for itself, and after that reuse those of activations."""
    if device.type == "cpu":
        _keep_freed_memory(MAPPED_BYTES)
    yield
    if device.type == "cpu":
        _keep_freed_memory(KEPT_PIECE_BYTES)


def _keep_freed_memory(piece_bytes: int) -> None:
    """Has glibc reuse the memory of pieces up to a size instead of mapping it afresh."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, piece_bytes)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def _ignore(_layer: int) -> None:
    pass


class Runner:
    """One rank of a model. On the last stage's first tensor rank `execute` draws tokens."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        sampler: Draws,
        device: str = "cpu",
        dtype: str = "auto",
        kv_dtype: str | None = None,
        parallel: Parallel = ALONE,
        blocks: int,
        block_tokens: int = 16,
        host_slots: int = 0,
        layer_groups: int = 4,
        threads: int = 1,
        deterministic: bool = False,
        ops: Ops | None = None,
        clock: Clock | None = None,
        storage: Storage | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`kv_dtype` is the model's where it is not given; `storage` is for the weights. `progress`
        is told of their bytes read so far, and of all this rank reads."""
        self.device = torch.device(device)
        parallel.check(checkpoint.config)
        name = resolve_dtype(dtype, checkpoint.config.dtype, self.device)
        self.parallel, self.checkpoint = parallel, checkpoint
        self.layout: KvLayout = checkpoint.layout(
            block_tokens=block_tokens,
            dtype=kv_dtype or name,
            tensor_parallel=parallel.tensor_size,
            pipeline_parallel=parallel.stages,
        )
        ops = ops or choose_ops(self.device, threads, deterministic=deterministic)
        self.kv = KvCache(
            self.layout, parallel.rank, blocks=blocks, device=self.device, host_slots=host_slots
        )
        self._storage = storage or OwnPieces(self.device)
        weights = RankWeights(checkpoint, parallel, TORCH_DTYPES[name], self.kv)
        with _gapless_heap(self.device):
            self._decoder = weights.load(ops, self._storage, progress)
        checkpoint.release()
        self._whole_steps: WholeSteps | None = None
        if self._decoder.whole and isinstance(sampler, Sampler):
            self._whole_steps = ops.whole_steps(
                self._decoder.logits_of_step,
                sampler,
                block_tokens=block_tokens,
                longest=checkpoint.max_length,
                device=self.device,
            )
        groups = self.layout.layer_groups(parallel.stage, layer_groups)
        self._sampler, self._clock = sampler, clock or SystemClock()
        self._ended_s = 0.0
        """When the last step that was collected was seen to be over."""
        self._reports = LayerReports(groups)
        if self.device.type == "cuda":
            self._reports = DeviceReports(groups, wait_s=parallel.wait_s, clock=self._clock)
        log.info("runner ready device=%s dtype=%s ops=%s blocks=%d", device, name, ops.name, blocks)

    def execute(
        self, batch: Batch, on_layer_group: Callable[[int], None] | None = None
    ) -> StepResult:
        start_s = self._clock.now()
        with (
            self._reports.telling(on_layer_group) as report,
            self.kv.swapping(batch),
        ):
            drawn = self._pass(batch, report) if batch.chunks else ()
        if not batch.chunks:
            self.parallel.await_ranks()
        self._storage.check_alive()
        return StepResult(drawn, self._clock.now() - start_s)

    @property
    def launch(self) -> Launch | None:
        """Where steps stay on the device, the next one may be launched while one runs."""
        return None if self._whole_steps is None else partial(self._launch, self._whole_steps)

    def _launch(self, steps: WholeSteps, batch: Batch) -> Collect | None:
        assert not batch.swaps, batch.swaps
        start_s = self._clock.now()
        with self._reports.launching():
            launched = steps.launch(batch.chunks)
        return None if launched is None else partial(self._collect, steps, launched, start_s)

    def _collect(self, steps: WholeSteps, launched: Launched, start_s: float) -> StepResult:
        self._reports.reach(launched.done)
        start_s = max(start_s, self._ended_s)  # it waited for the one before it
        self._ended_s = self._clock.now()
        drawn = steps.collect(launched)
        self._storage.check_alive()
        return StepResult(drawn, self._ended_s - start_s)

    def _pass(self, batch: Batch, report: Callable[[int], None]) -> tuple[Drawn, ...]:
        drawn = None if self._whole_steps is None else self._whole_steps.run(batch.chunks)
        if drawn is not None:
            for layer in self.layout.stage_layers(self.parallel.stage):
                report(layer)
            return drawn
        logits = self.logits(batch, report)
        self.parallel.await_device(self.device)
        return () if logits is None else self._draw(batch, logits)

    def close(self) -> None:
        """Gives up the file that other processes map the pool through."""
        self.kv.close()

    @torch.inference_mode()
    def logits(
        self, batch: Batch, on_layer: Callable[[int], None] = _ignore
    ) -> torch.Tensor | None:
        """fp32 logits of the chunks that draw; None on ranks that hold none, or if none draws."""
        packed = pack(batch.chunks, self.layout.block_tokens, self.device)
        return self._decoder.forward(packed, on_layer)

    def _draw(self, batch: Batch, logits: torch.Tensor) -> tuple[Drawn, ...]:
        drawing = [(c.draw, c.request_id) for c in batch.chunks if c.draw is not None]
        if not drawing or self.parallel.rank != self.parallel.drawing_rank:
            return ()
        draws, request_ids = zip(*drawing, strict=True)
        return tuple(self._sampler.sample(logits, draws, request_ids))
