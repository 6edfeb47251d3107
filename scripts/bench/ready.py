"""From the command to ready: starts `tandem serve` and stops it again, some times over.

    python scripts/bench/ready.py [--repeats 3] [--json] [ARGUMENT of `tandem serve` ...]

What counts is the time until the line on standard output that says `ready`, of the package as it
is installed beside this interpreter and with ports that the system picks. The first start reads
what later ones find in the page cache.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

GOAL_S = 15.0
STOPPING_S = 60.0


def main() -> None:
    options, arguments = parse()
    spent = [start_and_stop(arguments) for _ in range(options.repeats)]
    if options.json:
        print(json.dumps({"ready_s": [round(each, 2) for each in spent], "goal_s": GOAL_S}))
        return
    told = ", ".join(f"{each:.1f}" for each in spent)
    print(f"ready after {told} s, median {statistics.median(spent):.1f} (goal: under {GOAL_S:.0f})")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    return parser.parse_known_args()


def start_and_stop(arguments: list[str]) -> float:
    """Seconds until it says that it is ready."""
    command = [str(Path(sys.executable).with_name("tandem")), "serve", *arguments]
    command += ["--http-port", "0", "--grpc-port", "0"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        spent_s = time.perf_counter() - start
        server.send_signal(signal.SIGINT)
        server.wait(STOPPING_S)
    if not line.startswith("ready "):
        raise SystemExit(f"{' '.join(command)} ended without getting ready")
    return spent_s


if __name__ == "__main__":
    main()
