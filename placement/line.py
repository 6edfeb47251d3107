"""Lines fitted to what has been observed lately."""

from __future__ import annotations

DOUBT = 0.05
"""How little a first guess of a slope counts beside an observation at twice the usual x."""
KNOWN = 8.0
"""The most that is remembered of a slope, in such observations."""


class Line:
    """y = base + slope * x by least squares, older observations weighing less and less."""

    def __init__(self, slope: float, decay: float = 0.95) -> None:
        """Where no rising line fits, it goes through the origin."""
        self.base, self.slope = 0.0, slope
        self.observations = 0
        self._decay = decay
        self._w = self._x = self._y = self._xx = self._xy = 0.0

    def at(self, x: float) -> float:
        return self.base + self.slope * x

    def observe(self, x: float, y: float) -> None:
        """Both non-negative; a falling line or a negative base is noise and is not fitted."""
        self.observations += 1
        self._w = self._w * self._decay + 1.0
        self._x = self._x * self._decay + x
        self._y = self._y * self._decay + y
        self._xx = self._xx * self._decay + x * x
        self._xy = self._xy * self._decay + x * y
        self._fit()

    def _fit(self) -> None:
        spread = self._w * self._xx - self._x * self._x
        if spread > 0.01 * self._w * self._xx:
            slope = (self._w * self._xy - self._x * self._y) / spread
            base = (self._y - slope * self._x) / self._w
            if slope >= 0.0 and base >= 0.0:
                self.base, self.slope = base, slope
                return
        if self._xx > 0.0:
            self.base, self.slope = 0.0, self._xy / self._xx
        else:
            self.base = self._y / self._w


class DriftingLine:
    """y = base + slope * x, of which the base drifts and the slope hardly does.

    Only a moving x tells of the slope, so no more is forgotten of it than is learned: while x
    stands still, whatever y does is the base's.
    """

    def __init__(self, slope: float, decay: float) -> None:
        """A first guess of the slope, and what an older observation counts for the base."""
        self.base, self.slope = 0.0, slope
        self.observations = 0
        self._decay = decay
        self._w = self._x = self._y = 0.0
        self._known, self._told = DOUBT, DOUBT * slope

    def at(self, x: float) -> float:
        return self.base + self.slope * x

    def observe(self, x: float, y: float) -> None:
        """`x` is above zero."""
        if self.observations:
            self._learn_slope(x, y)
        self.observations += 1
        self._w = self._w * self._decay + 1.0
        self._x = self._x * self._decay + x
        self._y = self._y * self._decay + y
        self.base = max((self._y - self.slope * self._x) / self._w, 0.0)

    def _learn_slope(self, x: float, y: float) -> None:
        usual = self._x / self._w
        scale = max(x, usual)
        moved = (x - usual) / scale
        self._known += moved * moved
        self._told += moved * (y - self._y / self._w) / scale
        if self._known > KNOWN:
            self._told *= KNOWN / self._known
            self._known = KNOWN
        self.slope = max(self._told / self._known, 0.0)
