"""One accelerator's part of an instance: its weights, its KV pool and its way to other pools."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.instance.gpu_share import limit_multiprocessors
from cluster.instance.mover import RankMover, rank_name
from engine.errors import BadConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.config import Config
    from cluster.instance.borrowed_weights import Borrowed
    from cluster.instance.coded import Coder
    from cluster.roster import InstanceSpec
    from engine.batch import Executor
    from engine.checkpoint import Checkpoint
    from engine.layout import KvLayout
    from engine.parallel import Parallel
    from engine.runner import Runner
    from engine.sampler import Sampler
    from kvtransfer.transport import Transport

log = logging.getLogger(__name__)

CPU_KV_BYTES, CPU_KV_TOKENS = 1 << 30, 1 << 15
"""Most of either that a worker on a CPU takes if not told: memory there is the whole machine's.
One longest sequence may take more tokens."""
GPU_WORKSPACE_BYTES = 1 << 30
"""Left free on a GPU for activations."""


@dataclass(frozen=True, slots=True)
class LoadedRank:
    runner: Runner
    transport: Transport
    mover: RankMover
    checkpoint: Checkpoint
    blocks: int
    device: str


def load_rank(
    config: Config,
    spec: InstanceSpec,
    rank: int,
    meeting: str,
    *,
    one_host: bool,
    progress: Callable[[int, int], None],
) -> LoadedRank:
    """Loads this rank's weights; with several ranks all must call it, to meet at `meeting`."""
    os.environ["OMP_NUM_THREADS"] = str(config.engine.threads)
    if spec.sm_share is not None:
        limit_multiprocessors(spec.sm_share, spec.device, os.environ)
    import torch

    from cluster.instance.transports import open_transport
    from engine.checkpoint import open_checkpoint
    from engine.parallel import join
    from engine.runner import Runner, resolve_dtype, resolve_kv_dtype

    checkpoint = open_checkpoint(config.model, config.engine.max_length)
    device = torch.device(spec.device)
    dtype = resolve_dtype(config.engine.dtype, checkpoint.config.dtype, device)
    kv_dtype = resolve_kv_dtype(config.engine.kv_dtype, dtype, device)
    layout = checkpoint.layout(
        block_tokens=config.engine.block_tokens,
        dtype=kv_dtype,
        tensor_parallel=spec.tensor_parallel,
        pipeline_parallel=spec.pipeline_parallel,
    )
    blocks = count_blocks(config, checkpoint, layout, device.type, spec.gpu_share)
    staging = staging_blocks(config, layout, rank)
    parallel = join(
        rank,
        tensor_size=spec.tensor_parallel,
        stages=spec.pipeline_parallel,
        init_method=meeting,
        device=device,
    )
    weights = borrowed(config, spec, checkpoint, parallel, dtype=dtype, progress=progress)
    runner = Runner(
        checkpoint,
        sampler=make_sampler(checkpoint),
        device=spec.device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        parallel=parallel,
        blocks=blocks + staging,
        block_tokens=config.engine.block_tokens,
        host_slots=config.engine.host_slots,
        layer_groups=config.transfer.layer_groups,
        threads=config.engine.threads,
        deterministic=config.engine.deterministic,
        storage=None if weights is None else weights.storage(),
        progress=progress if weights is None else None,
    )
    me = rank_name(spec.name, rank)
    transport = open_transport(me, runner.kv, config.transfer, one_host=one_host)
    coder = open_coder(config, runner, blocks) if staging else None
    mover = open_mover(config, me, runner, transport, coder)
    return LoadedRank(runner, transport, mover, checkpoint, blocks, spec.device)


def open_mover(
    config: Config, me: str, runner: Runner, transport: Transport, coder: Coder | None
) -> RankMover:
    """Only on a CPU do copies and steps share the cores."""
    from cluster.instance.comparing import Comparing
    from cluster.instance.peers import RayPeers
    from kvtransfer.transport import Pool

    peers = RayPeers(me, config.limits.answer_s)
    pool = Pool.of_tensor(runner.kv.memory)
    checks = config.transfer.checksums
    rank = runner.kv.rank
    return RankMover(
        runner.layout,
        rank,
        transport,
        config.transfer.copy_share if runner.device.type == "cpu" else 1.0,
        peers=peers,
        coder=coder,
        comparing=Comparing(runner.layout, rank, pool, peers) if checks else None,
    )


def borrowed(
    config: Config,
    spec: InstanceSpec,
    checkpoint: Checkpoint,
    parallel: Parallel,
    *,
    dtype: str,
    progress: Callable[[int, int], None],
) -> Borrowed | None:
    """Weights that a GPU's workers share, until the process ends; None where each has its own."""
    if not config.engine.share_weights:
        return None
    if spec.device == "cpu":
        raise BadConfig("engine.share_weights", "true", "is for workers on GPUs")
    import torch

    from cluster.instance.borrowed_weights import borrow_weights
    from cluster.instance.weight_memory import GpuMemory

    return borrow_weights(
        checkpoint,
        config.engine.max_length,
        parallel,
        dtype=dtype,
        shared=GpuMemory(torch.device(spec.device)),
        device=spec.device,
        progress=progress,
    )


def staging_blocks(config: Config, layout: KvLayout, rank: int) -> int:
    """What is added to a pool for coded KV; the instance's blocks do not count it."""
    from cluster.instance.coded import slot_blocks

    if config.transfer.compression == "off":
        return 0
    return slot_blocks(config.transfer.staging_bytes, layout.block_bytes(rank))


def open_coder(config: Config, runner: Runner, blocks: int) -> Coder:
    from cluster.instance.coded import Coder, CodingSettings

    transfer = config.transfer
    settings = CodingSettings(transfer.compression, transfer.link_bytes_per_s, transfer.lease_s)
    return Coder(runner.layout, runner.kv.rank, runner.kv.memory, blocks, settings)


def lead_ranks(runner: Runner) -> Executor:
    """What runs batches on the whole instance; waits until the other ranks follow."""
    from engine.parallel_runner import ParallelRunner

    return runner if runner.parallel.size == 1 else ParallelRunner(runner)


def make_sampler(checkpoint: Checkpoint) -> Sampler:
    from engine.grammar import GrammarCompiler
    from engine.sampler import Sampler
    from engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(checkpoint.directory, checkpoint.config.vocab)
    grammars = GrammarCompiler(tokenizer)
    return Sampler(tokenizer.vocab_size, grammars, checkpoint.eos_token_ids)


def count_blocks(
    config: Config, checkpoint: Checkpoint, layout: KvLayout, device: str, gpu_share: float = 1.0
) -> int:
    """The same in every rank: what fits the tightest one, and no more than can be used."""
    most = max(layout.block_bytes(rank) for rank in range(layout.ranks))
    longest = -(-checkpoint.max_length // layout.block_tokens)
    kv_bytes = config.engine.kv_bytes
    if kv_bytes is None:
        if device == "cpu":
            roomy = max(CPU_KV_TOKENS // layout.block_tokens, longest)
            kv_bytes = min(CPU_KV_BYTES, roomy * most)
        else:
            kv_bytes = _free_gpu(config, checkpoint, layout, gpu_share)
    useful = longest * config.engine.decode.max_sequences
    blocks = min(kv_bytes // most, useful)
    if blocks < 2:
        rule = f"a block of this model takes {most} bytes in a worker"
        raise BadConfig("engine.kv_bytes", kv_bytes, rule)
    return int(blocks)


def _free_gpu(config: Config, checkpoint: Checkpoint, layout: KvLayout, gpu_share: float) -> int:
    """What the worker's part of its GPU leaves beside weights, of which it bears no more than that
    part where neighbours read them, too. All of the GPU counts, not what is free of it now, which
    differs between ranks."""
    import torch

    weights = _heaviest_weights(config, checkpoint, layout)
    if config.engine.share_weights:
        weights = int(weights * gpu_share)
    _, total = torch.cuda.mem_get_info()
    return max(int(total * gpu_share * config.engine.kv_share) - weights - GPU_WORKSPACE_BYTES, 0)


def _heaviest_weights(config: Config, checkpoint: Checkpoint, layout: KvLayout) -> int:
    """Bytes of the rank that holds most, in the dtype in which it holds them."""
    import torch

    from cluster.instance.borrowed_weights import weigh
    from engine.parallel import Parallel
    from engine.runner import resolve_dtype

    dtype = resolve_dtype(config.engine.dtype, checkpoint.config.dtype, torch.device("cuda"))
    tensor, stages = layout.tensor_parallel, layout.pipeline_parallel
    places = [
        Parallel(part, tensor, stage, stages) for stage in range(stages) for part in range(tensor)
    ]
    return max(weigh(checkpoint, place, dtype).nbytes for place in places)


def free_meeting(host: str) -> str:
    """Where the ranks of one instance meet: a port that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"
