"""Typed reading of a checkpoint's JSON: a wrong value is answered with its field and rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.errors import BadCheckpoint

if TYPE_CHECKING:
    from collections.abc import Mapping


class Fields:
    """One JSON object; `None` counts as absent, as it does for the libraries that write these."""

    def __init__(self, values: Mapping[str, Any], path: str = "config.json") -> None:
        self._values, self._path = values, path

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def bad(self, name: str, rule: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self._path}: {name}", self._values.get(name), rule)

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._get(name, default)
        if type(value) is not int or value < 1:
            raise self.bad(name, "must be a positive integer")
        return value

    def count(self, name: str, default: int) -> int:
        """An integer, zero or more."""
        value = self._get(name, default)
        if type(value) is not int or value < 0:
            raise self.bad(name, "must be an integer of zero or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(name, default)
        if type(value) not in (int, float) or value <= 0:
            raise self.bad(name, "must be a positive number")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self.bad(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if type(value) is not str:
            raise self.bad(name, "must be a string")
        return value

    def optional_integer(self, name: str) -> int | None:
        return self.integer(name) if name in self else None

    def optional_number(self, name: str) -> float | None:
        return self.number(name) if name in self else None

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        value = self._get(name, None)
        if type(value) is not list or {type(item) for item in value} - {int, float}:
            raise self.bad(name, "must be a list of numbers")
        if len(value) != length:
            raise self.bad(name, f"must hold {length} numbers")
        return tuple(float(item) for item in value)

    def pair(self, name: str) -> tuple[int, int]:
        """Two positive integers."""
        values = self.integers(name)
        if len(values) != 2 or min(values) < 1:
            raise self.bad(name, "must be a list of two positive integers")
        return values[0], values[1]

    def strings(self, name: str) -> tuple[str, ...]:
        value = self._get(name, None)
        if type(value) is not list or {type(item) for item in value} - {str}:
            raise self.bad(name, "must be a list of strings")
        return tuple(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, one integer, or nothing."""
        value = self._get(name, [])
        value = value if type(value) is list else [value]
        if {type(item) for item in value} - {int}:
            raise self.bad(name, "must be an integer or a list of integers")
        return tuple(value)

    def part(self, name: str) -> Fields:
        """A nested object; empty when absent."""
        value = self._get(name, {})
        if type(value) is not dict:
            raise self.bad(name, "must be an object")
        return Fields(value, f"{self._path}: {name}")

    def over(self, other: Fields) -> Fields:
        """These fields before those of `other`."""
        present = {name: value for name, value in self._values.items() if value is not None}
        return Fields({**other._values, **present}, self._path)

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def derived(self, name: str, values: Mapping[str, Any]) -> Fields:
        """Values worked out from these, reported as if they stood under `name`."""
        return Fields(values, f"{self._path}: {name}")
