"""When to doubt an instance, and how often to start it anew: pure, driven by the controller."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Heartbeats:
    """Who has been silent for too long. A name is watched once it has been heard."""

    silence_s: float
    _heard_s: dict[str, float] = field(default_factory=dict)

    def heard(self, name: str, now: float) -> None:
        self._heard_s[name] = now

    def forget(self, name: str) -> None:
        self._heard_s.pop(name, None)

    def silent(self, now: float) -> tuple[str, ...]:
        """In order of name; each is asked about once per silence."""
        silent = [n for n, heard in self._heard_s.items() if now - heard > self.silence_s]
        return tuple(sorted(silent))


@dataclass(slots=True)
class RestartBudget:
    """At most `restarts` in any `window_s`, later ones waiting longer."""

    restarts: int
    window_s: float
    most_pause_s: float = 10.0
    _at_s: deque[float] = field(default_factory=deque)

    def take(self, now: float) -> float | None:
        """How long to wait before the next start, or None if it must not be made."""
        while self._at_s and now - self._at_s[0] > self.window_s:
            self._at_s.popleft()
        if len(self._at_s) >= self.restarts:
            return None
        earlier = len(self._at_s)
        self._at_s.append(now)
        return 0.0 if earlier == 0 else min(0.25 * 2.0 ** (earlier - 1), self.most_pause_s)
