"""Prefill and decode rates of transformers' own loop; called by scripts/bench/engine.py."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    work = json.loads(sys.argv[1])
    torch.set_num_threads(work["threads"])
    dtype = getattr(torch, work["dtype"])
    model = AutoModelForCausalLM.from_pretrained(work["checkpoint"], dtype=dtype).eval()
    with torch.inference_mode():
        prefill_s = statistics.median(prefill(model, work["prompt"]) for _ in range(4))
        decode = {
            str(batch): batch / decode_step(model, batch, work["context"], work["steps"])
            for batch in work["batches"]
        }
    rates = {"prefill_tokens_s": work["prompt"] / prefill_s, "decode_tokens_s": decode}
    print(json.dumps(rates))


def prefill(model: torch.nn.Module, tokens: int) -> float:
    ids = torch.randint(3, 1000, (1, tokens))
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def decode_step(model: torch.nn.Module, batch: int, context: int, steps: int) -> float:
    cache = DynamicCache(config=model.config)
    ids = torch.randint(3, 1000, (batch, context))
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
    spent = []
    for _ in range(steps):
        start = time.perf_counter()
        token = model(token[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


if __name__ == "__main__":
    main()
