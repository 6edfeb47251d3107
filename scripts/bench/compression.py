"""What wire compression costs and what error it causes.

    python scripts/bench/compression.py [MODEL] [--prompts N] [--json]

Prefills prompts, codes and decodes their KV, and compares the next-token distribution of a decode
step over the decoded KV with that over the original; then measures coding speed on a prompt of a
0.6B-shaped model, and the link speed below which coding pays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from engine.batch import Batch, Chunk, Draw
from engine.checkpoint import open_checkpoint
from engine.layout import KvLayout
from engine.request import Sampling
from engine.runner import Runner
from engine.sampler import Sampler
from kvtransfer.coding import CodingSpeed, break_even_Bps
from kvtransfer.compression import CODECS, Codec, Staging

SHAPE = KvLayout("0.6B", 28, 8, 128, 16, "bfloat16")
SPEED_BLOCKS, BLOCKS = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description="the cost and the error of wire compression")
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runner = open_runner(options.model)
    prompts = list(texts(runner, options.prompts))
    figures = {
        name: {**errors(runner, prompts, codec), **speeds(codec)} for name, codec in CODECS.items()
    }
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        show(options.model, len(prompts), figures)


def open_runner(model: str) -> Runner:
    checkpoint = open_checkpoint(model)
    sampler = Sampler(checkpoint.config.vocab)
    return Runner(checkpoint, sampler=sampler, blocks=BLOCKS, dtype="float32")


def texts(runner: Runner, count: int) -> list[tuple[int, ...]]:
    """Prompts of what the model itself writes, each begun by another word of its vocabulary."""
    return [written(runner, 100 + 7 * number) for number in range(count)]


def written(runner: Runner, first: int, length: int = 200) -> tuple[int, ...]:
    tokens = [first % runner.checkpoint.config.vocab]
    while len(tokens) < length:
        tokens.append(int(next_logits(runner, tuple(tokens)).argmax()))
    return tuple(tokens)


def next_logits(runner: Runner, tokens: tuple[int, ...], start: int | None = None) -> torch.Tensor:
    """Logits after the tokens; only those from `start` on are computed."""
    start = len(tokens) - 1 if start is None else start
    blocks = tuple(range(-(-len(tokens) // runner.layout.block_tokens)))
    draw = Draw(Sampling(temperature=0.0), 0, len(tokens), ())
    logits = runner.logits(Batch((Chunk("one", tokens[start:], start, blocks, draw),)))
    assert logits is not None
    return logits[0].float()


def errors(runner: Runner, prompts: list[tuple[int, ...]], codec: Codec) -> dict[str, float]:
    relative, divergence, agreed = [], [], 0
    for tokens in prompts:
        next_logits(runner, tokens[:-1], start=0)
        plain = runner.kv.memory.clone()
        expected = next_logits(runner, tokens)
        runner.kv.memory.copy_(plain)
        relative.append(code_and_decode(runner, codec, len(tokens) - 1))
        found = next_logits(runner, tokens)
        divergence.append(kl(expected, found))
        agreed += int(expected.argmax() == found.argmax())
    return {
        "kv_relative_error": statistics.mean(relative),
        "kl_mean": statistics.mean(divergence),
        "kl_max": max(divergence),
        "same_next_token": agreed / len(prompts),
    }


def code_and_decode(runner: Runner, codec: Codec, tokens: int) -> float:
    """Replaces the prompt's KV by what a compressed hand-off would bring; its relative error."""
    layout, memory = runner.layout, runner.kv.memory
    staging = Staging(layout, 0, range(layout.layers), range(layout.kv_heads), codec)
    blocks = list(range(-(-tokens // layout.block_tokens)))
    before = memory.clone().view(torch.float32)
    wire = torch.empty(len(blocks) * staging.block_bytes, dtype=torch.uint8)
    staging.encode(memory, blocks, tokens, wire)
    staging.decode(wire, blocks, memory)
    full = tokens // layout.block_tokens * layout.block_bytes(0) // 4
    after = memory.view(torch.float32)
    return float((after[:full] - before[:full]).norm() / before[:full].norm())


def kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    return max(0.0, float((log_p.exp() * (log_p - log_q)).sum()))


def speeds(codec: Codec) -> dict[str, float]:
    """Single-threaded, in plain bytes a second."""
    torch.set_num_threads(1)
    staging = Staging(SHAPE, 0, range(SHAPE.layers), range(SHAPE.kv_heads), codec)
    plain = SPEED_BLOCKS * SHAPE.block_bytes(0)
    memory = torch.randn(plain // 2).to(torch.bfloat16).view(torch.uint8)
    wire = torch.empty(SPEED_BLOCKS * staging.block_bytes, dtype=torch.uint8)
    blocks = list(range(SPEED_BLOCKS))
    tokens = SPEED_BLOCKS * SHAPE.block_tokens
    encode_s = best_s(lambda: staging.encode(memory, blocks, tokens, wire))
    decode_s = best_s(lambda: staging.decode(wire, blocks, memory))
    speed = CodingSpeed(wire.numel() / plain, plain / encode_s, plain / decode_s)
    return {
        "ratio": speed.ratio,
        "encode_Bps": speed.encode_Bps,
        "decode_Bps": speed.decode_Bps,
        "break_even_Bps": break_even_Bps(speed),
    }


def best_s(work: Any) -> float:
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def show(model: str, prompts: int, figures: dict[str, dict[str, float]]) -> None:
    print(f"error over {prompts} prompts of 199 tokens of {model}, KV in float32\n")
    print("codec  KV error  KL mean   KL max    same next token")
    for name, row in figures.items():
        print(
            f"{name:6} {row['kv_relative_error']:7.2%}  {row['kl_mean']:.1e}   {row['kl_max']:.1e}"
            f"   {row['same_next_token']:.0%}"
        )
    print("\ncodec  of bfloat16  encode GB/s  decode GB/s  pays below Gbit/s")
    for name, row in figures.items():
        print(
            f"{name:6} {row['ratio']:11.1%} {row['encode_Bps'] / 1e9:12.2f}"
            f" {row['decode_Bps'] / 1e9:12.2f} {row['break_even_Bps'] * 8 / 1e9:18.2f}"
        )


if __name__ == "__main__":
    main()
