"""Times of transformers' own loop; called by scripts/bench/engine.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.bench.peer_answers import answer_questions, keep_stdout

REPEATS = 4


def main() -> None:
    work, answers = json.loads(sys.argv[1]), keep_stdout()
    torch.set_num_threads(work["threads"])
    dtype = getattr(torch, work["dtype"])
    model = AutoModelForCausalLM.from_pretrained(work["checkpoint"], dtype=dtype).eval()

    def measure(phase: str, batch: int) -> list[float]:
        if phase == "prefill":
            return [prefill(model, batch, work["prompt"]) for _ in range(REPEATS)]
        return decode_steps(model, batch, work["context"], work["steps"])

    with torch.inference_mode():
        answer_questions(answers, measure)


def prefill(model: torch.nn.Module, batch: int, tokens: int) -> float:
    ids = torch.randint(3, 1000, (batch, tokens))
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def decode_steps(model: torch.nn.Module, batch: int, context: int, steps: int) -> list[float]:
    cache = DynamicCache(config=model.config)
    ids = torch.randint(3, 1000, (batch, context))
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
    spent = []
    for _ in range(steps):
        start = time.perf_counter()
        token = model(token[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
        spent.append(time.perf_counter() - start)
    return spent


if __name__ == "__main__":
    main()
