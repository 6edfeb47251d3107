"""The other side of scripts/bench/peers.py: answers with times what is asked line by line.

Standard library alone, since it runs in the peers' environments.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import TextIO

Measure = Callable[[str, int], list[float]]
"""Seconds of each prefill, or of each decode step, of a batch."""


def keep_stdout() -> TextIO:
    """For the answers; what a peer prints from then on goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer_questions(answers: TextIO, measure: Measure) -> None:
    """Until there are no more."""
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(measure(asked["phase"], asked["batch"])), file=answers, flush=True)
