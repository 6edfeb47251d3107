"""Every error Tandem raises on purpose.

TandemError
├── BadInput                 the caller's fault; answered once, at the edge (exit 2, HTTP 400)
│   ├── BadConfig            a config, policy, plan or workload file
│   ├── BadCheckpoint        a model directory that cannot be loaded
│   ├── BadRequest           a request's field
│   │   └── PromptTooLong    a prompt that no instance's KV pool could hold
│   └── NoFeasiblePlan       no plan meets the targets; names the constraint that binds
├── Overloaded               refused now, may be accepted later (HTTP 429)
├── NotFound                 an unknown request or instance (HTTP 404)
├── OutOfBlocks              the KV pool cannot give what was asked
├── StaleEpoch               a message from an owner that has been replaced
├── TransferError            a KV movement that did not commit
│   ├── LayoutMismatch       the two sides do not hold the same model or block size
│   ├── TransportError       the bytes did not arrive
│   │   └── PeerLost         the other side is gone
│   ├── ChecksumMismatch     the bytes arrived altered
│   └── LeaseExpired         the other side stopped renewing
├── BadMessage               a message that does not decode to its schema
├── InstanceLost             an instance died with the request on it
├── DeadlineExceeded         a bounded wait ran out
├── BadLogits                a forward pass gave NaN or infinity
├── BatchFailed              a batch gave nothing because of the request it was run for
├── PoisonRequest            a request that brought down whatever it ran on, again and again
├── PlannerFailed            the process that plans again ended without a plan
└── Unsupported              this machine or build cannot do what was asked
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


class TandemError(Exception):
    """The root: catching it catches nothing that is a bug of ours."""


class BadInput(TandemError):
    """One line a person can act on: which field, what value, which rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field, self.value, self.rule = field, value, rule
        super().__init__(f"{field}: {value!r}: {rule}")

    def __reduce__(self) -> tuple[type[BadInput], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.rule)


class BadConfig(BadInput):
    pass


class BadCheckpoint(BadInput):
    pass


class BadRequest(BadInput):
    pass


class PromptTooLong(BadRequest):
    def __init__(self, prompt_tokens: int, wanted: int, largest: int) -> None:
        self.prompt_tokens, self.wanted, self.largest = prompt_tokens, wanted, largest
        rule = f"needs {wanted} KV blocks; the largest pool here has {largest}"
        super().__init__("prompt", prompt_tokens, rule)

    def __reduce__(self) -> tuple[type[PromptTooLong], tuple[int, int, int]]:  # type: ignore[override]
        return type(self), (self.prompt_tokens, self.wanted, self.largest)


class NoFeasiblePlan(BadInput):
    pass


class Overloaded(TandemError):
    def __init__(self, why: str, retry_after_s: float) -> None:
        self.why, self.retry_after_s = why, retry_after_s
        super().__init__(f"{why}; retry after {retry_after_s:.1f} s")

    def __reduce__(self) -> tuple[type[Overloaded], tuple[str, float]]:
        return type(self), (self.why, self.retry_after_s)


class NotFound(TandemError):
    pass


class OutOfBlocks(TandemError):
    def __init__(self, wanted: int, free: int) -> None:
        self.wanted, self.free = wanted, free
        super().__init__(f"{wanted} blocks wanted, {free} can be given")

    def __reduce__(self) -> tuple[type[OutOfBlocks], tuple[int, int]]:
        return type(self), (self.wanted, self.free)


class StaleEpoch(TandemError):
    pass


class TransferError(TandemError):
    pass


class LayoutMismatch(TransferError):
    pass


class TransportError(TransferError):
    pass


class PeerLost(TransportError):
    pass


class ChecksumMismatch(TransferError):
    pass


class LeaseExpired(TransferError):
    pass


class BadMessage(TandemError):
    pass


class InstanceLost(TandemError):
    pass


class DeadlineExceeded(TandemError):
    pass


class BadLogits(TandemError):
    pass


class BatchFailed(TandemError):
    pass


class PoisonRequest(TandemError):
    pass


class PlannerFailed(TandemError):
    pass


class Unsupported(TandemError):
    pass


def unknown_name(field: str, name: str, valid: Iterable[str]) -> BadConfig:
    """The error for a name that is not one of `valid`, with the nearest that is."""
    choices = sorted(valid)
    near = get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(choices)}"
    return BadConfig(field, name, f"unknown; {hint}")


def check_names(field: str, names: Iterable[object], valid: Collection[str]) -> None:
    """Raises for the first that is not one of `valid`."""
    for name in names:
        if name not in valid:
            raise unknown_name(field, str(name), valid)
