"""A line fitted to what has been observed lately."""

from __future__ import annotations


class Line:
    """y = base + slope * x by least squares, older observations weighing less and less."""

    def __init__(self, slope: float, decay: float = 0.95, *, keep_slope: bool = False) -> None:
        """Where no rising line fits, `keep_slope` moves the last one up or down; else the line
        goes through the origin."""
        self.base, self.slope = 0.0, slope
        self._keep_slope = keep_slope
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
        if self._keep_slope and self._y > self.slope * self._x:
            self.base = (self._y - self.slope * self._x) / self._w
        elif self._xx > 0.0:
            self.base, self.slope = 0.0, self._xy / self._xx
        else:
            self.base = self._y / self._w
