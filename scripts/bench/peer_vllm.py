"""Prefill and decode rates of vLLM's offline engine; called by scripts/bench/engine.py.

A decode step's time is the difference between answers of two lengths, so that the prefill and
what surrounds a call cancel out.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from typing import Any

REPEATS = 4


def main() -> None:
    work = json.loads(sys.argv[1])
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    longest = max(work["prompt"], work["context"] + work["steps"]) + 8
    engine = LLM(
        work["checkpoint"],
        dtype=work["dtype"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=longest,
        max_num_batched_tokens=max(longest, 8192),
        max_num_seqs=max(work["batches"]),
    )
    answer(engine, 1, work["prompt"], 2)
    prefill_s = statistics.median(answer(engine, 1, work["prompt"], 1) for _ in range(REPEATS))
    decode = {
        str(batch): batch / decode_step(engine, batch, work["context"], work["steps"])
        for batch in work["batches"]
    }
    rates = {"prefill_tokens_s": work["prompt"] / prefill_s, "decode_tokens_s": decode}
    print(json.dumps(rates))


def decode_step(engine: Any, batch: int, context: int, steps: int) -> float:
    short = statistics.median(answer(engine, batch, context, 1) for _ in range(REPEATS))
    long = statistics.median(answer(engine, batch, context, steps + 1) for _ in range(REPEATS))
    return (long - short) / steps


def answer(engine: Any, batch: int, prompt: int, tokens: int) -> float:
    """Seconds to answer `batch` random prompts with `tokens` tokens each."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [
        {"prompt_token_ids": [random.randrange(3, 1000) for _ in range(prompt)]}
        for _ in range(batch)
    ]
    start = time.perf_counter()
    engine.generate(prompts, greedy, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
