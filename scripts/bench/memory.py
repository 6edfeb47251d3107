"""Resident memory of one worker: weights once, plus the cache, plus what else it needs.

    python scripts/bench/memory.py MODEL [--blocks N] [--prompt N] [--sequences N]

Prints one JSON line. `overhead_mib` is the peak over loading, a prefill and decode steps, less the
weights and the cache; what a freshly started interpreter with torch takes is part of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.batch import Batch, Chunk, Draw
from engine.checkpoint import open_checkpoint
from engine.request import Sampling
from engine.runner import Runner
from engine.sampler import Sampler

MIB = 1 << 20


def main() -> None:
    options = parse()
    checkpoint = open_checkpoint(options.model)
    weights = sum(file.stat().st_size for file in checkpoint.directory.glob("*.safetensors"))
    runner = Runner(checkpoint, sampler=Sampler(checkpoint.config.vocab), blocks=options.blocks)
    loaded = peak_bytes()
    drive(runner, options.sequences, options.prompt)
    cache = runner.kv.memory.nbytes
    figures = {
        "weights_mib": weights / MIB,
        "cache_mib": cache / MIB,
        "peak_loading_mib": loaded / MIB,
        "peak_mib": peak_bytes() / MIB,
        "overhead_mib": (peak_bytes() - weights - cache) / MIB,
    }
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=8)
    return parser.parse_args()


def drive(runner: Runner, sequences: int, prompt: int) -> None:
    """Prefills each sequence by itself, then decodes all; together they touch the whole pool."""
    share = runner.kv.blocks // sequences
    tables = [tuple(range(i * share, (i + 1) * share)) for i in range(sequences)]
    prompt = min(prompt, share * runner.layout.block_tokens - 8)
    runner.kv.memory.zero_()
    for i, table in enumerate(tables):
        runner.execute(Batch((chunk(i, prompt, 0, table),)))
    for step in range(8):
        runner.execute(Batch(tuple(chunk(i, 1, prompt + step, t) for i, t in enumerate(tables))))


def chunk(name: int, count: int, start: int, blocks: tuple[int, ...]) -> Chunk:
    tokens = tuple(17 + (start + i) % 91 for i in range(count))
    return Chunk(str(name), tokens, start, blocks, Draw(Sampling(temperature=1.0), 0, count, ()))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
