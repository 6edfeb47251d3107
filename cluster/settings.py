"""From the config's sections to the settings that each part of the cluster takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.gateway import GatewaySettings
from engine.slo import Slo

if TYPE_CHECKING:
    from cluster.config import Config


def gateway_settings(config: Config) -> GatewaySettings:
    gateway, limits = config.gateway, config.limits
    return GatewaySettings(
        limits=limits.requests,
        journal=gateway.journal,
        routing=gateway.routing,
        admission=gateway.admission,
        slo=Slo(config.slo.ttft_s, config.slo.tpot_s),
        queue_s=limits.queue_s,
        request_s=limits.request_s,
    )
