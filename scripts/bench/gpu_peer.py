"""Transformers' own generate on a GPU, with a static cache and compiled, to stand beside ours.

    python scripts/bench/gpu_peer.py --output figures.jsonl [--shapes 0.6b,8b]
        [--device cuda|cpu] [--small]

For each shape with random weights: seconds a decode step by batch and context, as the difference
between generating many tokens and few, and seconds of a prompt. Bytes that a step must read over
its time are shown as a share of the copy bandwidth of the same run, as in scripts/bench/gpu.py,
whose steps and prompts these are. `--device cpu` compiles nothing and shows that it works.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoModelForCausalLM

from scripts.bench.gpu import (
    KNOWN_SHAPES,
    SMALL,
    Limits,
    Records,
    Sizes,
    machine,
    names,
    time_of,
    write_model,
)

if TYPE_CHECKING:
    from scripts.bench.gpu import Figures
    from scripts.bench.shapes import Shape

FEW, MANY = 16, 80
"""Tokens generated; the difference leaves the prompt out."""
STEPS = ((1, 1024), (32, 1024), (128, 1024), (1, 4096), (32, 4096))
"""Sequences and the context of each; more take a prompt of many minutes."""
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


def main() -> None:
    options = parse()
    device, records = torch.device(options.device), Records(options.output)
    sizes = SMALL if options.small else Sizes(steps=STEPS)
    records.measure("machine", partial(machine, device, sizes))
    found = records.of["machine"]
    limits = Limits(float(found["bytes_s"]), float(found["flops_s"]))
    for name in options.shapes:
        Peer(KNOWN_SHAPES[name], device, sizes, limits, records).measure()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=sorted(DTYPES), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--shapes", type=partial(names, KNOWN_SHAPES), default=["0.6b", "8b"])
    return parser.parse_args()


@dataclass(frozen=True)
class Peer:
    shape: Shape
    device: torch.device
    sizes: Sizes
    limits: Limits
    records: Records

    def measure(self) -> None:
        model = self._load()
        for batch, context in self.sizes.steps:
            name = f"transformers {self.shape.name} decode batch={batch} context={context}"
            self.records.measure(name, partial(self._step, model, batch, context))
        for prompt in self.sizes.step_prompts:
            name = f"transformers {self.shape.name} prefill tokens={prompt}"
            self.records.measure(name, partial(self._prompt, model, prompt))

    @property
    def _dtype(self) -> str:
        return DTYPES[self.device.type]

    def _load(self) -> Any:
        with tempfile.TemporaryDirectory() as scratch:
            write_model(self.shape, self._dtype, Path(scratch))
            dtype = getattr(torch, self._dtype)
            model = AutoModelForCausalLM.from_pretrained(scratch, dtype=dtype)
        return model.to(self.device).eval()

    def _step(self, model: Any, batch: int, context: int) -> Figures:
        prompt = context - (FEW + MANY) // 2  # the mean context of what is timed
        ids = self._ids(batch, max(prompt, 1))
        many_s, few_s = (
            time_of([partial(self._generate, model, ids, count)], 1, self.device)
            for count in (MANY, FEW)
        )
        step_s = (many_s - few_s) / (MANY - FEW)
        moved = self.shape.step_bytes(self._dtype, batch, context)
        return {"time_s": step_s, "of_bandwidth": moved / step_s / self.limits.bytes_s}

    def _generate(self, model: Any, ids: torch.Tensor, count: int) -> None:
        """The longest comes first: generate keeps the size of its cache, and what was compiled."""
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                cache_implementation="static",
                disable_compile=self.device.type == "cpu",
                pad_token_id=0,
            )

    def _prompt(self, model: Any, tokens: int) -> Figures:
        ids = self._ids(1, tokens)

        def run() -> None:
            with torch.inference_mode():
                model(ids, use_cache=True, logits_to_keep=1)

        spent_s = time_of([run], self.sizes.calls // 4 + 1, self.device)
        flops = self.shape.flops(tokens, tokens / 2, 1)
        return {"time_s": spent_s, "of_peak": flops / spent_s / self.limits.flops_s}

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(0)
        drawn = torch.randint(3, self.shape.vocab, (batch, tokens), generator=random)
        return drawn.to(self.device)


if __name__ == "__main__":
    main()
