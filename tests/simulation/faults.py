"""Which faults a world has, and how often."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random


@dataclass(frozen=True)
class Faults:
    """Probabilities per message, per request, or rates per virtual second."""

    lose: float = 0.02
    repeat: float = 0.02
    slow_link: float = 0.05
    """A message takes up to a second, so later ones overtake it."""
    kill_instance_per_s: float = 0.15
    kill_gateway_per_s: float = 0.03
    slow_detection: float = 0.2
    """The controller is down when an instance dies: the news comes late."""
    cancel: float = 0.15
    poison: float = 0.06
    """Any batch with this request in it fails."""
    lethal: float = 0.03
    """Any batch with this request in it ends the instance."""
    pull_error: float = 0.03
    corrupt: float = 0.1
    """A copy alters what it carries, where checksums are compared."""
    migrate_per_s: float = 15.0
    drain_per_s: float = 0.1
    switch_role_per_s: float = 0.2


NONE = Faults(**{field.name: 0.0 for field in fields(Faults)})


def drawn(rng: Random) -> Faults:
    """Each kind is switched off in a third of the worlds, so that they are met alone too."""
    values = {
        field.name: 0.0 if rng.random() < 1 / 3 else field.default * rng.choice((0.5, 1.0, 3.0))
        for field in fields(Faults)
    }
    return Faults(**values)
