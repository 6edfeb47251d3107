"""Requests put to a gateway at their time, and what their clients see."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.gateway.call import Call
from cluster.gateway.gateway import Gateway
from cluster.gateway.settings import GatewaySettings
from engine.clock import SystemClock
from engine.errors import TandemError
from engine.request import Sampling
from engine.tokenizer import Tokenizer
from scripts.bench.gpu import LONGEST_TOKENS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cluster.links import Link
    from engine.slo import Slo
    from placement.workload import Workload

READY_S, DRAIN_S = 60.0, 120.0
LOOK_S = 0.05
LEAST_TOKEN = 3


@dataclass(frozen=True)
class Sample:
    """From the moment at which the request was due; None where a token did not come."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met(self, slo: Slo) -> bool:
        return self.ttft_s is not None and slo.met_by(self.ttft_s, self.tpot_s)


def write_tokenizer(vocab: int, directory: Path) -> None:
    """A word for each token: prompts are given as tokens, and texts are read by nobody."""
    words = {f"w{token}": token for token in range(vocab)}
    model = {"type": "BPE", "vocab": words, "merges": []}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    document = {"version": "1.0", "model": model, "decoder": decoder}
    (directory / "tokenizer.json").write_text(json.dumps(document))


@asynccontextmanager
async def gateway_of(link: Link, model: Path, slo: Slo, instances: int) -> AsyncIterator[Gateway]:
    """One that has heard of so many instances."""
    gateway = Gateway(
        link,
        Tokenizer.open(model),
        SystemClock(),
        model="bench",
        context_tokens=LONGEST_TOKENS,
        settings=GatewaySettings(slo=slo),
    )
    running = asyncio.create_task(gateway.run())
    try:
        async with asyncio.timeout(READY_S):
            while len(gateway.loads()) < instances:  # noqa: ASYNC110  nothing tells of them
                await asyncio.sleep(LOOK_S)
        yield gateway
    finally:
        running.cancel()
        await asyncio.wait([running])


async def put(gateway: Gateway, load: Workload, vocab: int, seed: int) -> list[Sample]:
    """Those that have not ended a while after the last was due have failed."""
    rng = np.random.default_rng(seed)
    begun_s = time.monotonic()
    rows = zip(load.arrival_s, load.prompt_tokens, load.output_tokens, strict=True)
    tasks = [
        asyncio.create_task(
            ask(
                gateway,
                tuple(rng.integers(LEAST_TOKEN, vocab, int(prompt)).tolist()),
                int(output),
                begun_s + float(arrival_s),
            )
        )
        for arrival_s, prompt, output in rows
    ]
    await asyncio.wait(tasks, timeout=float(load.arrival_s[-1]) + DRAIN_S)
    late = [task for task in tasks if not task.done()]
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)
    return [Sample() if task.cancelled() else task.result() for task in tasks]


async def ask(gateway: Gateway, prompt: tuple[int, ...], tokens: int, due_s: float) -> Sample:
    await asyncio.sleep(due_s - time.monotonic())
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    try:
        answer = await gateway.open(Call((prompt,), sampling=sampling, max_tokens=tokens))
    except TandemError:
        return Sample()
    times_s: list[float] = []
    try:
        while deltas := await answer.next():
            times_s += [time.monotonic()] * len(deltas)
    except TandemError:
        return Sample()
    finally:
        gateway.close(answer)
    tpot_s = (times_s[-1] - times_s[0]) / (len(times_s) - 1) if len(times_s) > 1 else None
    return Sample(times_s[0] - due_s, tpot_s)
