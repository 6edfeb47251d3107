"""Times of vLLM's offline engine; called by scripts/bench/engine.py.

Its engine is stepped here, so that a decode step is timed by itself: one that gives every sequence
of the batch a token, after all of them have been prefilled.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.bench.peer_answers import answer_questions, keep_stdout

REPEATS = 4


def main() -> None:
    work, answers = json.loads(sys.argv[1]), keep_stdout()
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "6")
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

    def measure(phase: str, batch: int) -> list[float]:
        if phase == "prefill":
            return [answer(engine, batch, work["prompt"], 1) for _ in range(REPEATS)]
        return decode_steps(engine.llm_engine, batch, work["context"], work["steps"])

    answer_questions(answers, measure)


def decode_steps(engine: Any, batch: int, context: int, steps: int) -> list[float]:
    """Those with all sequences in them."""
    for number in range(batch):
        engine.add_request(f"{batch}-{number}", random_prompt(context), greedy(steps + 1))
    begun: set[str] = set()
    spent = []
    while engine.has_unfinished_requests():
        all_decode = len(begun) == batch
        start = time.perf_counter()
        told = engine.step()
        if all_decode and len(told) == batch:
            spent.append(time.perf_counter() - start)
        begun.update(output.request_id for output in told)
    if not spent:
        raise SystemExit(f"no step held all {batch} sequences: VLLM_CPU_KVCACHE_SPACE is too small")
    return spent


def answer(engine: Any, batch: int, prompt: int, tokens: int) -> float:
    """Seconds to answer `batch` random prompts with `tokens` tokens each."""
    prompts = [random_prompt(prompt) for _ in range(batch)]
    start = time.perf_counter()
    engine.generate(prompts, greedy(tokens), use_tqdm=False)
    return time.perf_counter() - start


def random_prompt(tokens: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [random.randrange(3, 1000) for _ in range(tokens)]}


def greedy(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)


if __name__ == "__main__":
    main()
