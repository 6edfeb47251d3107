"""The policy as a gateway knows it: from the config's file, or applied by hand since."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.policy_file import starting_policy
from engine.errors import BadInput, TandemError

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path

    from cluster.control.balancing import Note
    from engine.clock import Clock

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
"""How often the file is read."""


@dataclass(frozen=True, slots=True)
class PolicyText:
    """A policy file's text and when it was put in force; what a cluster starts with comes first."""

    text: str
    applied_s: float = 0.0


class Apply(Protocol):
    """Puts a policy in force at the controller; returns what changes."""

    def __call__(self, policy: PolicyText) -> Awaitable[list[str]]: ...


class PolicySource:
    """What is in force outlives the controller here: a new one is told the latest."""

    def __init__(self, path: Path | None, apply: Apply, note: Note, clock: Clock) -> None:
        self._path, self._apply, self._note, self._clock = path, apply, note, clock
        self._read = starting_policy(path)
        self.latest = None if self._read is None else PolicyText(self._read)

    async def apply(self, text: str) -> list[str]:
        policy = PolicyText(text, self._clock.now())
        changes = await self._apply(policy)
        self.latest = policy
        return changes

    async def follow(self) -> None:
        """Puts the file in force again whenever it changes."""
        while self._path is not None:
            await asyncio.sleep(LOOK_AGAIN_S)
            await self.look(self._path)

    async def look(self, path: Path) -> None:
        """A file that turns bad changes nothing, and is said to be bad once."""
        try:
            text = await asyncio.to_thread(path.read_text)
        except (OSError, UnicodeDecodeError) as error:
            self._refuse(path, None, error)
            return
        if text == self._read:
            return
        try:
            await self.apply(text)
        except BadInput as error:
            self._refuse(path, text, error)
        except TandemError as error:
            log.warning("policy not applied, to be tried again path=%s error=%s", path, error)
        else:
            self._read = text

    def _refuse(self, path: Path, text: str | None, error: Exception) -> None:
        if text != self._read:
            self._read = text
            self._note("policy", path.name, "refused, the running one stays", reason=str(error))
