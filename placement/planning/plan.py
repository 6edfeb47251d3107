"""A plan: which pools to run, what they are predicted to do, and why these."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import yaml

from engine.errors import BadConfig, check_names
from engine.messages import Role
from placement.latency.catalog import cores_of_worker
from placement.planning.co_location import CoLocation, check_units, co_location_from
from placement.planning.costbook import Cut
from placement.planning.plan_keys import CONFIG_KEYS, PLAN_KEYS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

SLO_KEYS = ("ttft_s", "tpot_s", "attainment")
POOL_KEYS = (
    "role",
    "instances",
    "tensor_parallel",
    "pipeline_parallel",
    "device",
    "nodes",
    "resources",
)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    role: Role
    instances: int
    cut: Cut
    nodes: tuple[str, ...] = ()

    @property
    def accelerators(self) -> int:
        return self.instances * self.cut.accelerators

    def __str__(self) -> str:
        return f"{self.instances} {self.role.value} ({self.cut})"


def in_words(pools: Iterable[PoolPlan], units: int | None = None) -> str:
    """Pools, and whether their instances lie side by side."""
    text = " + ".join(str(pool) for pool in pools)
    if units is None:
        return text
    return f"{text} side by side in {units} unit{'' if units == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Target:
    """What share of requests should meet which TTFT and TPOT."""

    ttft_s: float
    tpot_s: float
    attainment: float = 0.9

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not 0 < getattr(self, name) < inf:
                raise BadConfig(f"slo.{name}", getattr(self, name), "must be positive and finite")
        if not 0 < self.attainment <= 1:
            raise BadConfig("slo.attainment", self.attainment, "must be above 0 and at most 1")


@dataclass(frozen=True, slots=True)
class Alternative:
    """What the plan beat, in as many copies as the question takes."""

    pools: tuple[PoolPlan, ...]
    kind: str
    goodput_rps: float
    goodput_rps_per_gpu: float
    cost_per_hour: float
    power_w: float
    limit: str
    """What keeps it from serving more."""
    token_budget: int
    """Prompt tokens of a batch."""
    units: int | None = None
    """Those of a co-located one."""

    def __str__(self) -> str:
        return in_words(self.pools, self.units)


@dataclass(frozen=True, slots=True)
class Plan:
    model: str
    target: Target
    pools: tuple[PoolPlan, ...]
    hardware: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    alternatives: tuple[Alternative, ...] = ()
    reason: str = ""
    token_budget: int | None = None
    """Prompt tokens of a batch, where one was chosen."""
    engine: dict[str, Any] = field(default_factory=dict)
    """What else its instances are set to."""
    co_located: CoLocation | None = None

    @property
    def accelerators(self) -> int:
        return sum(pool.accelerators for pool in self.pools)

    @property
    def workers(self) -> int:
        """What a policy counts as accelerators."""
        return sum(pool.instances * pool.cut.workers for pool in self.pools)

    @property
    def deployed(self) -> str:
        """Its pools in words."""
        return in_words(self.pools, None if self.co_located is None else self.co_located.units)

    def to_yaml(self) -> str:
        content: dict[str, Any] = {
            "model": self.model,
            "slo": asdict(self.target),
            "hardware": self.hardware,
            "pools": [_pool_entry(pool) for pool in self.pools],
        }
        if self.co_located is not None:
            content["co_located"] = _rounded(asdict(self.co_located))
        engine = dict(self.engine)
        if self.token_budget is not None:
            prefill = engine.get("prefill") or {}
            engine["prefill"] = {**prefill, "token_budget": self.token_budget}
        if engine:
            content["engine"] = engine
        content["predicted"] = _rounded(self.predicted)
        content["alternatives"] = [_alternative_entry(other) for other in self.alternatives]
        content["reason"] = self.reason
        text: str = yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)
        return text


def read_plan(path: Path) -> Plan:
    if not path.is_file():
        raise BadConfig("plan", str(path), "no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BadConfig("plan", str(path), f"not YAML: {error}") from error
    return plan_from(content)


def plan_from(content: object) -> Plan:
    """The deployment of a plan and its targets; predictions and reasons are for people."""
    if not isinstance(content, dict):
        raise BadConfig("plan", content, "must be a mapping")
    check_names("plan", content, PLAN_KEYS + CONFIG_KEYS)
    pools = content.get("pools")
    if not isinstance(pools, list) or not pools:
        raise BadConfig("pools", pools, "a list with at least one pool")
    engine = _section("engine", content.get("engine"))
    prefill = _section("engine.prefill", engine.get("prefill"))
    budget = prefill.get("token_budget")
    threads = _whole("engine.threads", engine.get("threads", 1))
    read = tuple(_read_pool(f"pools[{i}]", raw, threads) for i, raw in enumerate(pools))
    roles = {pool.role for pool in read}
    if Role.MIXED not in roles and len(roles) == 1:
        raise BadConfig(
            "pools", read[0].role.value, "need a prefill and a decode pool, or a mixed one"
        )
    return Plan(
        model=str(content.get("model", "demo")),
        target=_read_target(_section("slo", content.get("slo"))),
        pools=read,
        hardware=_section("hardware", content.get("hardware")),
        predicted=_section("predicted", content.get("predicted")),
        reason=str(content.get("reason", "")),
        token_budget=None if budget is None else _whole("engine.prefill.token_budget", budget),
        engine=engine,
        co_located=_read_co_location(content.get("co_located"), read),
    )


def _section(where: str, value: object) -> dict[str, Any]:
    """One that is left out or empty says nothing."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadConfig(where, value, "must be a mapping")
    return value


def _read_target(slo: dict[str, Any]) -> Target:
    check_names("slo", slo, SLO_KEYS)
    return Target(
        _number("slo.ttft_s", slo.get("ttft_s", 2.0)),
        _number("slo.tpot_s", slo.get("tpot_s", 0.1)),
        _number("slo.attainment", slo.get("attainment", 0.9)),
    )


def _read_co_location(raw: object, pools: Sequence[PoolPlan]) -> CoLocation | None:
    if raw is None:
        return None
    together = co_location_from(raw)
    shapes = ((pool.instances, pool.cut.pipeline) for pool in pools)
    check_units("co_located.units", together.units, shapes)
    if len({pool.cut.device for pool in pools}) > 1:
        rule = "pools lie side by side only on one kind of device"
        raise BadConfig("co_located.units", together.units, rule)
    return together


def _read_pool(where: str, raw: object, threads: int) -> PoolPlan:
    if not isinstance(raw, dict):
        raise BadConfig(where, raw, "must be a mapping")
    check_names(where, raw, POOL_KEYS)
    roles = [role.value for role in Role]
    if raw.get("role") not in roles:
        raise BadConfig(f"{where}.role", raw.get("role"), f"one of {', '.join(roles)}")
    device = str(raw.get("device", "cpu-core"))
    cut = Cut(
        device,
        _whole(f"{where}.tensor_parallel", raw.get("tensor_parallel", 1)),
        _whole(f"{where}.pipeline_parallel", raw.get("pipeline_parallel", 1)),
        cores_of_worker(device, threads),
    )
    instances = _whole(f"{where}.instances", raw.get("instances", 1))
    return PoolPlan(Role(raw["role"]), instances, cut, _nodes(f"{where}.nodes", raw.get("nodes")))


def _nodes(where: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise BadConfig(where, value, "must be a list of nodes' addresses")
    return tuple(value)


def _whole(where: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadConfig(where, value, "must be a whole number of at least 1")
    return value


def _number(where: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
        raise BadConfig(where, value, "must be a finite number")
    return float(value)


def _pool_entry(pool: PoolPlan) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "role": pool.role.value,
        "instances": pool.instances,
        "tensor_parallel": pool.cut.tensor,
        "pipeline_parallel": pool.cut.pipeline,
        "device": pool.cut.device,
    }
    if pool.nodes:
        entry["nodes"] = list(pool.nodes)
    return entry


def _alternative_entry(other: Alternative) -> dict[str, Any]:
    return {
        "kind": other.kind,
        "pools": str(other),
        "goodput_rps": round(other.goodput_rps, 4),
        "goodput_rps_per_gpu": round(other.goodput_rps_per_gpu, 4),
        "cost_per_hour": round(other.cost_per_hour, 4),
        "power_w": round(other.power_w, 1),
        "token_budget": other.token_budget,
        "limit": other.limit,
    }


def _rounded(value: Any) -> Any:
    """Six digits are more than a prediction has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return value
