"""What the other gateways have counted, so that each of them can show the whole cluster."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_LIVES = 1000
"""Gateways' lives whose counts are remembered; a counter must not fall when a gateway dies."""


class OtherGateways:
    """The latest word of each life of each other gateway."""

    def __init__(self) -> None:
        self._tallies: dict[str, dict[str, Any]] = {}
        self._attained: dict[str, tuple[int, int]] = {}
        """Of those that answered last: requests that met their targets, and all that ended."""

    def heard(self, documents: Iterable[dict[str, Any]]) -> None:
        """The answers to one question that all gateways were asked."""
        self._attained.clear()
        remembered: dict[str, dict[str, Any]] = {}
        for document in documents:
            life = document["life"]
            self._keep(life, document["tallies"])
            met, ended = document["attained"]
            self._attained[life] = met, ended
            remembered |= document["remembered"]
        for life in remembered.keys() - self._tallies.keys():
            self._keep(life, remembered[life])

    def _keep(self, life: str, tallies: dict[str, Any]) -> None:
        if life in self._tallies or len(self._tallies) < MOST_LIVES:
            self._tallies[life] = tallies

    @property
    def tallies(self) -> list[dict[str, Any]]:
        return list(self._tallies.values())

    @property
    def lives(self) -> list[str]:
        return list(self._tallies)

    def unknown_to(self, lives: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is remembered of others than these: one that has just begun knows of no dead."""
        known = set(lives)
        return {life: kept for life, kept in self._tallies.items() if life not in known}

    @property
    def attained(self) -> tuple[int, int]:
        counts = self._attained.values()
        return sum(met for met, _ in counts), sum(ended for _, ended in counts)


def new_life() -> str:
    return uuid.uuid4().hex
