"""From the config's sections to the settings that each part of the cluster takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from cluster.gateway.settings import GatewaySettings
from cluster.instance.instance import InstanceSettings
from decode.scheduler import DecodeSettings
from engine.slo import Slo
from placement.role import RoleSettings

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


def instance_settings(config: Config) -> InstanceSettings:
    engine = config.engine
    decode = DecodeSettings(**asdict(engine.decode), host_slots=engine.host_slots)
    role = RoleSettings(engine.prefill, decode, engine.tpot_share)
    return InstanceSettings(role, config.transfer)
