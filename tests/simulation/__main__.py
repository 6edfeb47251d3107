"""Runs any number of seeds: python -m tests.simulation --seeds N [--start S] [--jobs J]."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.world import World


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
    total: Counter[str] = Counter()
    failures = 0
    with ProcessPoolExecutor(args.jobs) as pool:
        for seed, failure, outcomes in pool.map(run_seed, seeds, chunksize=20):
            total.update(outcomes)
            if failure is not None:
                failures += 1
                print(f"seed {seed} failed:\n{failure}", file=sys.stderr)
    took_s = time.monotonic() - began
    outcomes_text = " ".join(f"{name}={count}" for name, count in sorted(total.items()))
    print(f"seeds={args.seeds} failures={failures} wall_s={took_s:.1f} {outcomes_text}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
