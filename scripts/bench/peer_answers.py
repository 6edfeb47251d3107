"""The other side of scripts/bench/peers.py: answers with times what is asked line by line.

Standard library alone, since it runs in the peers' environments.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

Measure = Callable[[str, int], list[float]]
"""Seconds of each prefill, or of each decode step, of a batch."""


def answer_questions(measure: Measure) -> None:
    """Until there are no more; what a peer prints meanwhile goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(measure(asked["phase"], asked["batch"])), file=answers, flush=True)
