"""Which request is let in, and which goes next: bounds, early refusal, priorities, fair share.

Requests wait here rather than in front of an instance, so that order can still change. Among the
most urgent ones the tenant that has been served least goes next, by a virtual token counter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from engine.errors import Overloaded

if TYPE_CHECKING:
    from engine.request import Request


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    queue_requests: int = 1024
    """Requests that may wait here."""
    tenant_queue_requests: int = 512
    """Of them, requests of one tenant."""
    live_requests: int = 4096
    """Requests waiting and under way."""
    ahead_requests: int = 16
    """Requests that are sent in any case, for each instance that prefills, before the first
    tokens of those sent earlier."""
    ahead_tokens: int = 8192
    """Prompt tokens that are: many short prompts make one batch."""
    patience: float = 10.0
    """How many times the default TTFT target a request that states none may have to wait."""
    output_weight: float = 2.0
    """What an output token costs a tenant's share, in prompt tokens."""
    tenants: int = 10_000
    """Tenants whose use is remembered."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted TTFT of a request as things are, and if it were alone."""

    ttft_s: float
    alone_s: float


@dataclass(slots=True, eq=False)
class _Tenant:
    served_tokens: float = 0.0
    waiting: list[tuple[int, float, int, str]] = field(default_factory=list)
    """A heap: most urgent first, then oldest."""
    live: int = 0


class Admission:
    def __init__(self, settings: AdmissionSettings | None = None) -> None:
        self.settings = settings or AdmissionSettings()
        self._tenants: dict[str, _Tenant] = {}
        self._waiting: dict[str, Request] = {}
        self._under_way: dict[str, Request] = {}
        self._ahead: dict[str, int] = {}
        """Prompt tokens of requests sent and without a first token."""
        self._ahead_tokens = 0
        self._submitted = 0
        self.waiting_tokens = 0
        """Prompt tokens of the requests that wait here."""

    @property
    def waiting_requests(self) -> int:
        return len(self._waiting)

    @property
    def live_requests(self) -> int:
        return len(self._waiting) + len(self._under_way)

    def submit(self, request: Request, forecast: Forecast | None, *, strict: bool = False) -> None:
        """Queue a request or raise Overloaded. `strict`: it stated its own TTFT target."""
        self._check_bounds(request)
        if forecast is not None:
            self._check_forecast(request, forecast, strict=strict)
        tenant = self._tenant(request.tenant)
        tenant.live += 1
        self._submitted += 1
        place = (-request.priority, request.arrival_s, self._submitted, request.id)
        heappush(tenant.waiting, place)
        self._waiting[request.id] = request
        self.waiting_tokens += len(request.prompt)

    def next(self, prefilling_instances: int) -> Request | None:
        """Take the request that goes next, or None while enough are ahead of their first token."""
        if not self._may_go(prefilling_instances):
            return None
        candidates = [
            (tenant.waiting[0][0], tenant.served_tokens, tenant.waiting[0][1:], tenant)
            for tenant in self._tenants.values()
            if tenant.waiting
        ]
        if not candidates:
            return None
        *_, tenant = min(candidates, key=lambda one: one[:3])
        request = self._waiting.pop(heappop(tenant.waiting)[3])
        self.waiting_tokens -= len(request.prompt)
        self._under_way[request.id] = request
        self._ahead[request.id] = len(request.prompt)
        self._ahead_tokens += len(request.prompt)
        tenant.served_tokens += len(request.prompt)
        return request

    def prefilled(self, request_id: str) -> None:
        self._ahead_tokens -= self._ahead.pop(request_id, 0)

    def charge(self, tenant: str, output_tokens: int) -> None:
        if tenant in self._tenants:
            self._tenants[tenant].served_tokens += output_tokens * self.settings.output_weight

    def ended(self, request_id: str) -> None:
        """Finished, failed or withdrawn, from wherever it was."""
        self.prefilled(request_id)
        request = self._under_way.pop(request_id, None)
        if request is None:
            request = self._withdraw(request_id)
        if request is not None:
            self._tenants[request.tenant].live -= 1

    def served_tokens(self) -> dict[str, float]:
        return {name: tenant.served_tokens for name, tenant in self._tenants.items()}

    def _may_go(self, prefilling_instances: int) -> bool:
        settings = self.settings
        return (
            len(self._ahead) < settings.ahead_requests * prefilling_instances
            or self._ahead_tokens < settings.ahead_tokens * prefilling_instances
        )

    def _withdraw(self, request_id: str) -> Request | None:
        request = self._waiting.pop(request_id, None)
        if request is not None:
            waiting = self._tenants[request.tenant].waiting
            waiting[:] = [place for place in waiting if place[3] != request_id]
            heapify(waiting)
            self.waiting_tokens -= len(request.prompt)
        return request

    def _check_bounds(self, request: Request) -> None:
        settings = self.settings
        tenant = self._tenants.get(request.tenant)
        if len(self._waiting) >= settings.queue_requests:
            raise Overloaded(f"{settings.queue_requests} requests are waiting", 1.0)
        if tenant is not None and len(tenant.waiting) >= settings.tenant_queue_requests:
            rule = f"{settings.tenant_queue_requests} requests of this tenant are waiting"
            raise Overloaded(rule, 1.0)
        if self.live_requests >= settings.live_requests:
            raise Overloaded(f"{settings.live_requests} requests are under way", 1.0)

    def _check_forecast(self, request: Request, forecast: Forecast, *, strict: bool) -> None:
        """A target that even an idle cluster would miss is no reason to refuse, a queue is."""
        target_s = request.slo.ttft_s
        allowed_s = target_s if strict else target_s * self.settings.patience
        allowed_s = max(allowed_s, forecast.alone_s + target_s)
        if forecast.ttft_s > allowed_s:
            why = f"the first token would take {forecast.ttft_s:.1f} s, {allowed_s:.1f} s allowed"
            raise Overloaded(why, forecast.ttft_s - allowed_s)

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            self._forget_idle()
            tenant = self._tenants[name] = _Tenant()
        if tenant.live == 0:
            # Time spent away earns no credit.
            active = [one.served_tokens for one in self._tenants.values() if one.live]
            tenant.served_tokens = max(tenant.served_tokens, min(active, default=0.0))
        return tenant

    def _forget_idle(self) -> None:
        if len(self._tenants) >= self.settings.tenants:
            idle = [name for name, tenant in self._tenants.items() if not tenant.live]
            for name in idle:
                del self._tenants[name]
