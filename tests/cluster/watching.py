"""What a gateway would have observed, for tests of those who watch."""

from __future__ import annotations

from cluster.watching.observer import Ended, Opened
from engine.events import Timeline
from engine.messages import InstanceState, Load, Migrated, Role, Running
from engine.slo import Slo


def load(
    instance: str = "decode-0",
    role: Role = Role.DECODE,
    state: InstanceState = InstanceState.READY,
    **changes: object,
) -> Load:
    fields: dict[str, object] = {
        "queue_requests": 0,
        "queued_tokens": 0,
        "running_sequences": 0,
        "running_tokens": 0,
        "free_blocks": 100,
        "total_blocks": 100,
        "block_tokens": 16,
        "pinned_blocks": 0,
        "cached_blocks": 0,
        "step_s": 0.01,
        "sequences": (),
    }
    return Load(instance=instance, role=role, state=state, **{**fields, **changes})  # type: ignore[arg-type]


def running(request_id: str, state: str = "running", output_tokens: int = 1) -> Running:
    return Running(request_id, 2, state, 0, 16, output_tokens, 2)


def opened(request_id: str = "r", at_s: float = 100.0, **changes: object) -> Opened:
    fields: dict[str, object] = {
        "prompt_tokens": 16,
        "slo": Slo(),
        "prefill": "prefill-0",
        "decode": "decode-0",
        "timeline": Timeline(at_s),
    }
    return Opened(request_id, at_s, **{**fields, **changes})  # type: ignore[arg-type]


def timeline(arrived_s: float = 100.0) -> Timeline:
    """Queue 0.1, prefill 0.2, transfer 0.05, decode queue 0.01, first step 0.04, end after 1 s."""
    return Timeline(
        arrived_s,
        arrived_s + 0.1,
        arrived_s + 0.3,
        arrived_s + 0.35,
        arrived_s + 0.36,
        arrived_s + 0.4,
        arrived_s + 1.0,
    )


def ended(request_id: str = "r", outcome: str = "length", **changes: object) -> Ended:
    fields: dict[str, object] = {
        "timeline": timeline(),
        "prompt_tokens": 16,
        "output_tokens": 11,
        "slo": Slo(),
        "kv_bytes": 4096,
    }
    return Ended(request_id, outcome, **{**fields, **changes})  # type: ignore[arg-type]


def migrated(request_id: str = "r", outcome: str = "committed") -> Migrated:
    return Migrated(request_id, "decode-0", "decode-1", "balance", outcome, 0.004, 0.08, 8192)
