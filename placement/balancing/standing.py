"""What an instance stands for in the balancer's eyes, and each of the sequences on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.blocks import blocks_for
from engine.messages import InstanceState
from engine.request import SequenceState
from kvtransfer.transfer import TransferState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine.messages import Load, Running
    from placement.balancing.settings import BalancerSettings

QUEUED = (SequenceState.WAITING.value, SequenceState.SWAPPED.value, TransferState.OFFERED.value)


@dataclass(slots=True, eq=False)
class Standing:
    """An instance as it will be once the moves decided so far are done."""

    load: Load
    free_blocks: int
    virtual_blocks: float
    batch: int
    leaving: int = 0
    arriving: int = 0
    here: dict[str, Running] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.load.instance

    @property
    def open(self) -> bool:
        return self.load.state is InstanceState.READY and self.load.role.decodes

    @property
    def freeness(self) -> float:
        """Decode steps until the blocks run out; negative where more is asked for than is."""
        return self.after(0.0, 0)

    def after(self, blocks: float, sequences: int) -> float:
        """Freeness with so much more, or less, on it."""
        if self.load.state is not InstanceState.READY:
            return float("-inf")
        left = self.load.total_blocks - self.virtual_blocks - blocks
        return left * self.load.block_tokens / max(self.batch + sequences, 1)

    def waits(self) -> bool:
        """Whether something waits for room."""
        return any(missing_blocks(one, self.load) for one in self.here.values())

    def demand(self) -> int:
        """Blocks that the first of those that wait for room is short of; what gave way is to come
        back into what is left, not to take it from newcomers elsewhere."""
        waiting = [one for one in self.here.values() if not gave_way(one)]
        missing = (missing_blocks(one, self.load) for one in waiting)
        wanted = next((blocks for blocks in missing if blocks), 0)
        return max(wanted - max(self.free_blocks, 0), 0)


def virtual_blocks(load: Load, here: Iterable[Running], settings: BalancerSettings) -> float:
    """Blocks in use, what waits for room, and the headroom of the urgent."""
    sequences = list(here)
    used = load.total_blocks - load.free_blocks
    queued = sum(missing_blocks(one, load) for one in sequences)
    urgent = any(is_urgent(one, settings) for one in sequences)
    return used + queued + (settings.headroom_blocks if urgent else 0)


def runs(one: Running) -> bool:
    """Decodes: a prompt that is being computed cannot move."""
    return one.state == SequenceState.RUNNING.value and one.output_tokens > 0


def waits_without_kv(one: Running) -> bool:
    return one.state == SequenceState.WAITING.value and one.blocks == 0


def is_new(one: Running) -> bool:
    """Nothing of it has been computed or drawn: wherever it goes it begins alike."""
    return waits_without_kv(one) and one.output_tokens == 0


def gave_way(one: Running) -> bool:
    """It is let in before anything new."""
    displaced = one.state in (SequenceState.WAITING.value, SequenceState.SWAPPED.value)
    return displaced and one.blocks == 0 and one.output_tokens > 0


def missing_blocks(one: Running, load: Load) -> int:
    """Blocks that a sequence waits for."""
    if one.state not in QUEUED:
        return 0
    wanted = blocks_for(one.prompt_tokens + one.output_tokens, load.block_tokens)
    return max(wanted - one.blocks, 0)


def is_urgent(one: Running, settings: BalancerSettings) -> bool:
    return one.priority >= settings.urgent_priority


def smallest_first(one: Running) -> tuple[int, int, str]:
    return one.priority, one.blocks, one.request_id


def least_urgent_first(sequences: Iterable[Running]) -> list[Running]:
    return sorted(sequences, key=smallest_first)
