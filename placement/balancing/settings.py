"""What the balancer goes by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class BalancerPolicy(str, Enum):
    """What an instance is judged by."""

    FREENESS = "freeness"
    TPOT = "tpot"


@dataclass(frozen=True, slots=True)
class BalancerSettings:
    policy: BalancerPolicy = BalancerPolicy.FREENESS
    """freeness looks at room alone; tpot also at the step that the profile predicts."""
    low_steps: float = 128.0
    """An instance with room for fewer decode steps is relieved ..."""
    high_steps: float = 256.0
    """... until it has room for so many; only instances with more are targets."""
    hole_steps: float = 32.0
    """Room that an instance keeps which helps another to make a hole for what waits there."""
    headroom_blocks: int = 64
    """Room that the urgent requests of an instance should find, shared by them."""
    urgent_priority: int = 1
    """From this priority on a request is urgent."""
    growth_blocks: int = 2
    """Room that a target must have beyond what moves."""
    reserve_share: float = 0.02
    """Part of a target's blocks that moves leave free."""
    newcomer_share: float = 0.4
    """Part of a target's blocks that balance moves leave free: filled up evenly by what runs long,
    all instances would run out at once, and newcomers find room nowhere."""
    outgoing_moves: int = 4
    """Moves under way from one instance."""
    incoming_moves: int = 4
    """Moves under way to one instance."""
    link_moves: int = 1
    """Moves under way from one instance to another."""
    drain_moves: int = 8
    """Each of these limits for an instance that is being emptied."""
    moves_a_minute: int = 2
    """How often one request may move, drains apart."""
    patience_s: float = 5.0
    """A move that shows no effect for so long is taken to have failed."""
    copy_tokens_s: float = 100_000.0
    """KV that a link moves, for the cost of a move."""
    fixed_cost_s: float = 0.02
    """What any move costs."""
    least_gain: float = 1.0
    """Seconds of decoding gained before blocks run out, per second of moving."""
    tpot_s: float = 0.1
    """With the tpot policy: the target ..."""
    act_share: float = 0.95
    """... an instance whose predicted step exceeds this share of it is relieved ..."""
    rest_share: float = 0.85
    """... until it is below this one, and so are targets."""
    step_s: float = 0.01
    """With the tpot policy, from `tandem profile`: what a decode step takes at least ..."""
    step_sequence_s: float = 1e-4
    """... more for each sequence in it ..."""
    step_kv_token_s: float = 1e-7
    """... and for each token of their context."""
