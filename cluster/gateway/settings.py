"""How long and how much: everything that bounds a gateway."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.gateway.call import RequestLimits
from cluster.gateway.entry import JournalSettings
from engine.slo import Slo
from placement.routing.admission import AdmissionSettings
from placement.routing.router import RouterSettings


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    limits: RequestLimits = field(default_factory=RequestLimits)
    journal: JournalSettings = field(default_factory=JournalSettings)
    routing: RouterSettings = field(default_factory=RouterSettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    slo: Slo = field(default_factory=Slo)
    """Targets of requests that state none."""
    queue_s: float = 120.0
    """The longest that a request may wait before it is sent anywhere."""
    request_s: float = 3600.0
    """The longest that a request may take."""
    silence_s: float = 2.0
    """After so long without a heartbeat an instance is only sent what nobody else can take."""
    sweep_s: float = 0.1
    """How often time limits are looked at."""
