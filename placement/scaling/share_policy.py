"""How multiprocessors may be moved between roles."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from placement.scaling.fields import PositiveSeconds, Seconds, Section


class SmShares(Section):
    """Moves multiprocessors between the prefill and the decode instances of shared GPUs, by which
    of TTFT and TPOT misses its target while the other has room. Each move restarts the instances
    concerned, one after another."""

    step: Annotated[float, Field(ge=0.05, le=0.5)] = 0.1
    """Part of a GPU that one move takes from a role and gives to the other."""
    least: Annotated[float, Field(ge=0.05, lt=1.0)] = 0.2
    """What a role keeps."""
    percentile: Annotated[float, Field(gt=0.0, lt=100.0)] = 90.0
    """Of the latencies."""
    delay_s: Seconds = 60.0
    """A role must miss its target this long."""
    interval_s: PositiveSeconds = 600.0
    """Between two moves at least."""
