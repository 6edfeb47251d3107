"""Which request makes a batch fail: its requests are run again by halves, and the others wait."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from engine.batch import Batch

if TYPE_CHECKING:
    from placement.role import Step


class Trials:
    def __init__(self) -> None:
        self._groups: list[tuple[str, ...]] = []
        """Parts of failed batches still to be run apart, the next one last."""
        self.blamed_in_a_row = 0

    @property
    def pending(self) -> bool:
        return bool(self._groups)

    def cut(self, step: Step) -> Step:
        """The next group to be tried; all of the step when there is nothing left to find out.

        A group that this step has no part of is let go: if it fails again, it is tried again.
        """
        while self._groups:
            group = self._groups.pop()
            decodes = tuple(chunk for chunk in step.decodes if chunk.request_id in group)
            prefills = tuple(chunk for chunk in step.prefills if chunk.request_id in group)
            if decodes or prefills:
                batch = Batch(decodes + prefills, step.batch.swaps)
                return replace(step, batch=batch, decodes=decodes, prefills=prefills)
        return step

    def passed(self) -> None:
        self.blamed_in_a_row = 0

    def failed(self, batch: Batch) -> str | None:
        """The request to blame, if it ran alone; any others are tried in two halves."""
        names = tuple(chunk.request_id for chunk in batch.chunks)
        if len(names) == 1:
            self.blamed_in_a_row += 1
            return names[0]
        half = len(names) // 2
        self._groups += [part for part in (names[half:], names[:half]) if part]
        return None
