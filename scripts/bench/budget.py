"""Runs an autoscaler through random histories and prints whether the budget ever was exceeded."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.placement.fleet import random_history, settle  # noqa: E402


def one(seed: int) -> tuple[int, dict[str, float]]:
    """A history's figures; `exceeded` and `deadlocked` are what must not be."""
    try:
        fleet, elapsed_s = random_history(seed)
    except AssertionError:
        return seed, {"exceeded": 1}
    turns = max(fleet.figures.turns.values(), default=0) / elapsed_s * 3600.0
    cooled = fleet.policy.cooldown_s >= 60.0
    try:
        settle(fleet)
    except AssertionError:
        return seed, {"deadlocked": 1}
    figures = fleet.figures
    return seed, {
        "decisions": figures.decisions,
        "starts": figures.starts,
        "failed_starts": figures.failed_starts,
        "stops": figures.stops,
        "switches": figures.switches,
        "losses": figures.losses,
        "reached_budget": figures.most_in_use == fleet.policy.budget_accelerators,
        "turns_an_hour_at_60_s_cool_down": turns if cooled else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.histories)
    begun_s = time.monotonic()
    total: Counter[str] = Counter()
    bad, most_turns = [], 0.0
    with ProcessPoolExecutor(arguments.processes) as pool:
        for seed, figures in pool.map(one, seeds, chunksize=50):
            most_turns = max(most_turns, figures.pop("turns_an_hour_at_60_s_cool_down", 0.0))
            total.update({name: int(value) for name, value in figures.items()})
            if "exceeded" in figures or "deadlocked" in figures:
                bad.append(seed)
    document = {
        "histories": arguments.histories,
        "exceeded": total.pop("exceeded", 0),
        "deadlocked": total.pop("deadlocked", 0),
        "failing_seeds": bad[:20],
        "most_turns_an_hour_at_60_s_cool_down": round(most_turns, 1),
        **total,
        "wall_s": round(time.monotonic() - begun_s, 1),
    }
    print(json.dumps(document, indent=2))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
