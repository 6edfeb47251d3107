"""Hand-off between two processes of a 2,048-token prompt of a 0.6B-shaped model in bf16.

    python scripts/bench/handoff.py [--rounds N] [--json] [--no-prefill]

Prints what a plain memcpy of as many bytes reaches in the same run, then each transport against
it, pieces of several sizes, what idle transports cost, and how long the first decode step waits
for the hand-off when layer groups are pulled while the prefill still computes.

Both sides' pools hold several prompts, and rounds take them in turn, so that no figure comes out
of a cache; memcpy takes turns over buffers of the same sizes.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from engine.layout import KvLayout
from kvtransfer.auto import AutoTransport
from kvtransfer.plan import Copies, RankPull, plan_rank
from kvtransfer.shared_memory import shared_pool
from kvtransfer.transport import Pool, checksum

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from kvtransfer.transport import Pull

PROMPT_TOKENS, PROMPTS, LAYER_GROUPS = 2048, 3, 4
LAYOUT = KvLayout("0.6B", 28, 8, 128, 16, "bfloat16")
BLOCKS = PROMPT_TOKENS // LAYOUT.block_tokens
PROMPT_BYTES = BLOCKS * LAYOUT.block_bytes(0)
PIECES = {"4 KB": 4096, "64 KB": 65536, "256 KB": 262144, "1.8 MB": LAYOUT.block_bytes(0)}
GOALS = {"auto": 0.60, "nixl": 0.35}
"""Transports asked for, and the share of memcpy's bandwidth that each must reach."""
WAIT_S, IDLE_S = 60.0, 3.0


def main() -> None:
    options = parse()
    figures: dict[str, Any] = {"prompt_bytes": PROMPT_BYTES, "cores": os.cpu_count()}
    figures |= bandwidths(options.rounds)
    if options.prefill:
        figures["overlap"] = overlap()
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-prefill", dest="prefill", action="store_false")
    return parser.parse_args()


# ---- Bandwidth.


def bandwidths(rounds: int) -> dict[str, Any]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    source = multiprocessing.get_context("spawn").Process(target=hold_source, args=(theirs,))
    source.start()
    theirs.close()
    pool = make_pool(content=1)
    targets = {}
    for way in GOALS:
        targets[way] = AutoTransport("target", pool, preference=way)
        ours.send(way)
        targets[way].connect("source", ours.recv())
    try:
        return {
            "auto_is": targets["auto"].uses("source"),
            **compare(targets, rounds),
            "pieces": {label: by_piece(targets, size) for label, size in PIECES.items()},
            "idle_core_share": idle_share(),
        }
    finally:
        ours.close()
        source.join(WAIT_S)
        for target in targets.values():
            target.close()


def hold_source(pipe: Connection) -> None:
    pool = make_pool(content=2)
    opened: list[AutoTransport] = []
    while True:
        try:
            preference = pipe.recv()
        except EOFError:
            break
        opened.append(AutoTransport("source", pool, preference=preference))
        pipe.send(opened[-1].metadata("target"))
    for transport in opened:
        transport.close()


def make_pool(content: int) -> Pool:
    """Memory as the engine's own pools are made of."""
    pool = shared_pool(PROMPTS * PROMPT_BYTES)
    pool.bytes()[:] = content
    return pool


def compare(targets: dict[str, AutoTransport], rounds: int) -> dict[str, Any]:
    """Median and best bandwidths; the shares are medians of each round's own, since what else
    the machine does slows all of a round, and those of the best rounds."""
    copies = [prompt_copies(number) for number in range(PROMPTS)]
    buffers = [(np.ones(PROMPT_BYTES, np.uint8), np.ones(PROMPT_BYTES, np.uint8)) for _ in copies]
    taken: dict[str, list[float]] = {"memcpy": [], **{name: [] for name in targets}}
    for number in range(-PROMPTS, rounds):
        lap = {"memcpy": memcpy_s(*buffers[number % PROMPTS])}
        for name, target in targets.items():
            lap[name] = pull_s(target, copies[number % PROMPTS])
        if number >= 0:
            for name, seconds in lap.items():
                taken[name].append(seconds)
    return {
        "bandwidth_Bps": {n: PROMPT_BYTES / statistics.median(s) for n, s in taken.items()},
        "best_Bps": {n: PROMPT_BYTES / min(s) for n, s in taken.items()},
        "of_memcpy": {n: share_of(taken["memcpy"], taken[n]) for n in targets},
        "best_of_memcpy": {n: min(taken["memcpy"]) / min(taken[n]) for n in targets},
    }


def share_of(memcpy: list[float], seconds: list[float]) -> float:
    return statistics.median(m / s for m, s in zip(memcpy, seconds, strict=True))


def prompt_copies(number: int) -> Copies:
    """A prompt's hand-off between block tables as scattered as after hours of serving."""
    shuffled = [np.random.default_rng(seed).permutation(PROMPTS * BLOCKS) for seed in (1, 2)]
    run = slice(number * BLOCKS, (number + 1) * BLOCKS)
    (pull,) = plan_rank(LAYOUT, LAYOUT, shuffled[0][run].tolist(), shuffled[1][run].tolist(), 0)
    return pull.copies


def memcpy_s(source: np.ndarray, target: np.ndarray) -> float:
    start = time.perf_counter()
    target[:] = source
    return time.perf_counter() - start


def pull_s(target: AutoTransport, copies: Copies) -> float:
    start = time.perf_counter()
    target.pull("source", copies).wait(WAIT_S)
    return time.perf_counter() - start


def by_piece(targets: dict[str, AutoTransport], size: int) -> dict[str, float]:
    """Bandwidth when everything is cut into scattered pieces of one size."""
    count = PROMPT_BYTES // size
    places = [np.random.default_rng(seed).permutation(count) * size for seed in (1, 2)]
    copies = Copies(places[0], places[1], np.full(count, size, np.int64))
    return {
        way: PROMPT_BYTES / statistics.median(pull_s(target, copies) for _ in range(3))
        for way, target in targets.items()
    }


def idle_share() -> float:
    """Share of a core that this process takes with all its transports open and nothing to do."""
    before = time.process_time()
    threading.Event().wait(IDLE_S)
    return (time.process_time() - before) / IDLE_S


# ---- Overlap with a prefill.


def overlap() -> dict[str, float]:
    """Prefill in one process while the other pulls each layer group as it is written."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory))
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        source = multiprocessing.get_context("spawn").Process(
            target=prefill, args=(theirs, directory)
        )
        source.start()
        theirs.close()
        pool = shared_pool(PROMPT_BYTES)
        pool.bytes()[:] = 0
        target = AutoTransport("target", pool)
        try:
            target.connect("source", ours.recv())
            laps = [follow(ours, target, pool) for _ in range(3)]
        finally:
            ours.close()
            source.join(WAIT_S)
            target.close()
    lap = min(laps, key=lambda lap: lap["prefill_s"])
    return {**lap, "wait_of_prefill": lap["wait_s"] / lap["prefill_s"]}


def follow(pipe: Connection, target: AutoTransport, pool: Pool) -> dict[str, float]:
    """Pulls what the source announces; the wait is from its last layer to our last byte."""
    pipe.send("go")
    pulls: list[Pull] = []
    ends: list[float] = []
    while (said := pipe.recv())[0] == "group":
        layers = LAYOUT.layer_groups(0, LAYER_GROUPS)[said[1]]
        pulls.append(target.pull("source", group_copies(layers).copies))
        pulls[-1].add_done_callback(lambda: ends.append(time.monotonic()))
    _, prefill_s, ended_s, crc = said
    for pull in pulls:
        pull.wait(WAIT_S)
        pull.cancel()
    wait_s = max(0.0, max(ends) - ended_s)
    offsets, nbytes = np.array([0]), np.array([PROMPT_BYTES])
    assert crc == checksum(pool, offsets, nbytes), "the copy differs from its source"
    pool.bytes()[:] = 0
    return {"prefill_s": prefill_s, "wait_s": wait_s}


def group_copies(layers: range) -> RankPull:
    blocks = list(range(BLOCKS))
    (pull,) = plan_rank(LAYOUT, LAYOUT, blocks, blocks, 0, layers=layers)
    return pull


def prefill(pipe: Connection, directory: str) -> None:
    """The source: a real runner over random weights, on one core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from engine.batch import Batch, Chunk
    from engine.checkpoint import open_checkpoint
    from engine.runner import Runner
    from engine.sampler import Sampler

    checkpoint = open_checkpoint(directory)
    runner = Runner(
        checkpoint,
        sampler=Sampler(checkpoint.config.vocab),
        blocks=BLOCKS,
        layer_groups=LAYER_GROUPS,
    )
    assert replace(runner.layout, model=LAYOUT.model) == LAYOUT
    pool = Pool.of_tensor(runner.kv.memory, runner.kv.fd)
    source = AutoTransport("source", pool)
    pipe.send(source.metadata("target"))
    tokens = tuple(number % checkpoint.config.vocab for number in range(PROMPT_TOKENS))
    batch = Batch((Chunk("prompt", tokens, 0, tuple(range(BLOCKS)), None),))
    while True:
        try:
            pipe.recv()
        except EOFError:
            break
        start = time.monotonic()
        runner.execute(batch, lambda group: pipe.send(("group", group)))
        ended = time.monotonic()
        crc = checksum(pool, np.array([0]), np.array([PROMPT_BYTES]))
        pipe.send(("done", ended - start, ended, crc))
    source.close()


def write_checkpoint(directory: Path) -> None:
    """Random weights in the shape of Qwen3-0.6B, with a small vocabulary."""
    import torch
    from safetensors.torch import save_file

    hidden, heads, inner, vocab = 1024, 16, 3072, 4096
    queries, values = heads * LAYOUT.head_dim, LAYOUT.kv_heads * LAYOUT.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocab, hidden),
        "model.norm": (hidden,),
    }
    for layer in range(LAYOUT.layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (values, hidden),
                "self_attn.v_proj": (values, hidden),
                "self_attn.o_proj": (hidden, queries),
                "self_attn.q_norm": (LAYOUT.head_dim,),
                "self_attn.k_norm": (LAYOUT.head_dim,),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }.items()
        }
    tensors = {
        f"{name}.weight": (torch.randn(shape) * 0.02).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": LAYOUT.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": LAYOUT.kv_heads,
        "head_dim": LAYOUT.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))


# ---- Printing.


def show(figures: dict[str, Any]) -> None:
    speeds, best = figures["bandwidth_Bps"], figures["best_Bps"]
    print(
        f"prompt of {PROMPT_TOKENS} tokens: {PROMPT_BYTES / 1e6:.0f} MB, {figures['cores']} cores"
    )
    print(f"{'':22}  median            best     (GB/s, share of memcpy)")
    print(f"{'memcpy':22} {speeds['memcpy'] / 1e9:6.2f}          {best['memcpy'] / 1e9:6.2f}")
    for way, share in figures["of_memcpy"].items():
        label = f"auto ({figures['auto_is']})" if way == "auto" else way
        print(
            f"{label:22} {speeds[way] / 1e9:6.2f} {share:6.0%}   {best[way] / 1e9:6.2f} "
            f"{figures['best_of_memcpy'][way]:6.0%}  (goal {GOALS[way]:.0%})"
        )
    print("\npiece, GB/s" + "".join(f"{way:>13}" for way in GOALS))
    for label, row in figures["pieces"].items():
        print(f"{label:11}" + "".join(f"{row[way] / 1e9:13.2f}" for way in GOALS))
    print(f"\nidle, every transport open: {figures['idle_core_share']:.2%} of a core (goal 2%)")
    if "overlap" in figures:
        lap = figures["overlap"]
        print(
            f"prefill {lap['prefill_s']:.2f} s; the first decode step waits "
            f"{lap['wait_s'] * 1e3:.1f} ms = {lap['wait_of_prefill']:.2%} of it (goal 3%)"
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
