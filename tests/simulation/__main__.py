"""Runs any number of seeds: python -m tests.simulation --seeds N [--start S] [--jobs J]."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.world import World

CHUNK = 20
TOLD_EVERY = 1000


def run_seed(seed: int) -> tuple[int, str | None, Counter[str]]:
    """The seed, what broke if anything did, and what its requests came to."""
    world = World(seed)
    try:
        world.run()
    except Exception:  # noqa: BLE001 - the boundary: the failing seed is printed and kept
        return seed, traceback.format_exc(), Counter()
    outcomes: Counter[str] = Counter(events=world.events)
    for gateway in world.gateways.values():
        outcomes["finished"] += len(gateway.finished)
        outcomes.update(gateway.failed.values())
    return seed, None, outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    began = time.monotonic()
    seeds = range(args.start, args.start + args.seeds)
    total: Counter[str] = Counter(seeds=0, failures=0)
    with ProcessPoolExecutor(args.jobs, initializer=_collect_rarely) as pool:
        for seed, failure, outcomes in pool.map(run_seed, seeds, chunksize=CHUNK):
            total.update(outcomes, seeds=1)
            if failure is not None:
                total["failures"] += 1
                print(f"seed {seed} failed:\n{failure}", file=sys.stderr)
            if total["seeds"] % TOLD_EVERY == 0 or total["seeds"] == args.seeds:
                took_s = time.monotonic() - began
                counts = " ".join(f"{name}={count}" for name, count in total.items())
                print(f"wall_s={took_s:.1f} {counts}", flush=True)
    return 1 if total["failures"] else 0


def _collect_rarely() -> None:
    """A world is one large cycle: looking for smaller ones costs time and finds none."""
    gc.freeze()
    gc.set_threshold(50_000)


if __name__ == "__main__":
    sys.exit(main())
