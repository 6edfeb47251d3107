"""What a deployment is: the model behind every config file, plan and command-line flag."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.config_errors import first_error
from cluster.doors.limits import GrpcLimits, HttpLimits
from cluster.gateway.call import RequestLimits
from cluster.gateway.entry import JournalSettings
from cluster.plan_file import plan_values
from cluster.roster import MOST_INSTANCES
from cluster.yaml_file import read_yaml
from cluster.zmq_link import LinkLimits
from decode.scheduler import DecodeTuning
from engine.errors import BadConfig
from kvtransfer.transfer import TransferSettings
from kvtransfer.transport import TransportLimits
from placement.balancing.settings import BalancerSettings
from placement.planning.co_location import check_units
from placement.routing.admission import AdmissionSettings
from placement.routing.router import RouterSettings
from prefill.scheduler import PrefillSettings

if TYPE_CHECKING:
    from engine.messages import Role

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Seconds = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class PoolShape(Section):
    instances: Annotated[int, Field(ge=0, le=MOST_INSTANCES)] = 1
    """Model copies in this role."""
    tensor_parallel: Count = 1
    """Accelerators that share each layer; they are placed on one node."""
    pipeline_parallel: Count = 1
    """Stages of layers; they may lie on different nodes."""
    resources: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    """What Ray reserves for each worker, such as CPU, GPU or a custom resource."""
    sm_share: Share | None = None
    """Part of a GPU's multiprocessors that each worker is kept to by NVIDIA's MPS, whose daemon
    must run on the node; for workers whose resources give them less than a whole GPU."""

    @property
    def workers(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


class PoolConfig(PoolShape):
    more: tuple[PoolShape, ...] = ()
    """Further pools of this role, each with the keys above: instances of another shape or on other
    devices. What is started later, by hand or by a policy, is as the first pool has it."""

    @property
    def shapes(self) -> tuple[PoolShape, ...]:
        return (self, *self.more)

    @property
    def all_instances(self) -> int:
        return sum(shape.instances for shape in self.shapes)


class PoolsConfig(Section):
    prefill: PoolConfig = Field(default_factory=lambda: PoolConfig(instances=1))
    """Instances that compute prompts."""
    decode: PoolConfig = Field(default_factory=lambda: PoolConfig(instances=1))
    """Instances that draw the tokens after the first."""
    mixed: PoolConfig = Field(default_factory=lambda: PoolConfig(instances=0))
    """Instances that do both."""
    units: Count | None = None
    """Equal parts into which the instances of all pools are divided. Those of a part lie side by
    side, of every stage on one node, so that their KV stays within nodes; without it, they lie
    wherever there is room."""

    def of(self, role: Role) -> PoolConfig:
        pool: PoolConfig = getattr(self, role.value)
        return pool

    @property
    def all_shapes(self) -> tuple[PoolShape, ...]:
        """Of instances that there are from the start."""
        pools = (self.prefill, self.decode, self.mixed)
        return tuple(shape for pool in pools for shape in pool.shapes if shape.instances)

    @model_validator(mode="after")
    def _serves_both_phases(self) -> Self:
        prefill, decode = self.prefill.all_instances, self.decode.all_instances
        if not self.mixed.all_instances and not (prefill and decode):
            raise ValueError("needs a prefill and a decode instance, or a mixed one")
        return self

    @model_validator(mode="after")
    def _units_are_equal(self) -> Self:
        if self.units is None:
            return self
        shapes = self.all_shapes
        check_units(
            "pools.units", self.units, [(one.instances, one.pipeline_parallel) for one in shapes]
        )
        if any(one.resources.get("CPU") == 0 and not any(one.resources.values()) for one in shapes):
            raise ValueError("with units every pool must ask Ray for something: resources")
        return self


class SloConfig(Section):
    ttft_s: Seconds = 2.0
    """Target for the time to the first token, where a request names none."""
    tpot_s: Seconds = 0.1
    """Target for the mean time per token after the first."""
    attainment: Share = 0.9
    """Share of the requests that should meet both."""


class EngineConfig(Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights; auto is the checkpoint's own, but never float16 on a CPU."""
    kv_dtype: Literal["auto", "float8_e4m3fn"] = "auto"
    """Of KV; auto is that of the weights. In 8 bits, on GPUs only, memory holds twice the tokens,
    less exactly; with the scales that the checkpoint has, else 1."""
    max_length: Count | None = None
    """Longest sequence served; the model's own limit if not given."""
    block_tokens: Literal[8, 16, 32, 64, 128, 256] = 16
    """Tokens in a KV block."""
    kv_bytes: Count | None = None
    """KV memory of a worker; if not given, on a CPU room for 32768 tokens, or for one longest
    sequence, but at most 1 GiB; on a GPU what kv_share leaves."""
    kv_share: Share = 0.9
    """Part of a GPU's memory that weights and KV may take: of the worker's share of it, where its
    pool's resources give it less than a whole GPU."""
    share_weights: bool = False
    """Whether workers of one GPU read one copy of the weights, which a process of its own keeps
    while any of them runs; where every pool gives its workers less than a whole GPU and cuts the
    model alike."""
    host_slots: Annotated[int, Field(ge=0)] = 0
    """Blocks of host memory that preempted sequences can be swapped to."""
    threads: Count = 1
    """Threads of a CPU worker."""
    warm_up_tokens: Annotated[int, Field(ge=0)] = 256
    """Length of the prompt that an instance runs, with decode steps of contexts up to as long,
    before it takes requests; 0 runs nothing."""
    warm_up_sequences: Count = 32
    """Sequences in the largest of those decode steps."""
    deterministic: bool = False
    """Whether a sequence's result must not depend on its neighbours in a batch, even at a cost."""
    cache_prefixes: bool = True
    """Whether a prompt may reuse the KV of an earlier one of the same tenant."""
    prefill: PrefillSettings = PrefillSettings()
    """The prefill scheduler."""
    decode: DecodeTuning = DecodeTuning()
    """The decode scheduler."""
    tpot_share: Share = 0.9
    """Part of the tightest TPOT target that a batch of a mixed instance may take."""
    step_log: Path | None = None
    """Directory in which every instance writes a CSV of its batches: what each held, and how long
    it took."""


@dataclass(frozen=True, slots=True)
class TransferConfig(TransferSettings):
    transport: Literal["auto", "shared_memory", "cuda_ipc", "nixl", "nccl"] = "auto"
    """How KV moves; auto picks the fastest that both sides have."""
    compression: Literal["off", "auto", "int8", "int4"] = "off"
    """Codes KV for the wire where that makes a pull shorter; at the price of exactness."""
    link_bytes_per_s: Annotated[float, Field(gt=0)] | None = None
    """Bandwidth between instances, for that choice; measured from the pulls if not given."""
    staging_bytes: Annotated[int, Field(gt=0)] = 64 << 20
    """Memory of a worker for coded KV, if compression is not off."""
    copies: TransportLimits = field(default_factory=TransportLimits)


class MigrationConfig(Section):
    enabled: bool = True
    """Whether the balancer may move running requests."""
    interval_s: Seconds = 0.5
    """How often it looks."""
    balancer: BalancerSettings = BalancerSettings()
    """What it moves, and how much at a time."""


class TlsConfig(Section):
    certificate: Path
    """PEM file shown to clients."""
    key: Path
    """PEM file of its private key."""
    client_ca: Path | None = None
    """PEM file of the authority that clients' certificates must come from (mutual TLS)."""


class GatewayConfig(Section):
    instances: Annotated[int, Field(ge=1, le=64)] = 1
    """Gateway processes. The n-th after the first listens on both ports plus n; on another host
    than the first's if `host` is not loopback and Ray finds one."""
    host: str = "127.0.0.1"
    """Address that both doors listen on."""
    http_port: Port = 8000
    """0 picks a free one."""
    grpc_port: Port = 50051
    """0 picks a free one."""
    served_name: str | None = None
    """The model's name in the API; its source's last part if not given."""
    tls: TlsConfig | None = None
    """Without it, HTTP and gRPC are plain."""
    api_keys_file: Path | None = None
    """Keys that are let in; without it, everyone is."""
    http: HttpLimits = HttpLimits()
    """Sizes and times of HTTP requests."""
    grpc: GrpcLimits = GrpcLimits()
    """Sizes and times of gRPC calls."""
    journal: JournalSettings = JournalSettings()
    """The record of every request under way."""
    routing: RouterSettings = RouterSettings()
    """Where requests go."""
    admission: AdmissionSettings = AdmissionSettings()
    """Which requests are let in, and in which order."""

    def numbered(self, number: int) -> GatewayConfig:
        """The same for the n-th process, with its own ports."""
        ports = {name: getattr(self, name) for name in ("http_port", "grpc_port")}
        moved = {name: port + number for name, port in ports.items() if port}
        return self.model_copy(update=moved)

    @model_validator(mode="after")
    def _ports_are_apart(self) -> Self:
        last = max(self.http_port, self.grpc_port) + self.instances - 1
        if last > 65535:
            raise ValueError(f"instances: {self.instances} of them would need port {last}")
        ports = [self.http_port, self.grpc_port]
        if all(ports) and 0 <= abs(ports[0] - ports[1]) < self.instances:
            raise ValueError("http_port and grpc_port lie too close for so many instances")
        return self


class LimitsConfig(Section):
    requests: RequestLimits = RequestLimits()
    """What one request may ask for."""
    queue_s: Seconds = 120.0
    """The longest that a request may wait before it is sent anywhere."""
    request_s: Seconds = 3600.0
    """The longest that a request may take."""
    start_s: Seconds = 900.0
    """How long an instance may take to load and warm up."""
    pass_s: Seconds = 300.0
    """The longest that one forward pass may take, with kernels that are compiled in it and CUDA
    graphs that are made; after that its instance counts as lost."""
    drain_s: Seconds = 30.0
    """How long a shutdown, a drained instance or an operator's move waits for requests."""
    heartbeat_s: Seconds = 0.25
    """How often an instance tells its load."""
    silence_s: Seconds = 1.0
    """After so long without a heartbeat the instance is asked whether it lives."""
    gateway_silence_s: Seconds = 10.0
    """After so long without a sign of a gateway its requests are dropped everywhere."""
    answer_s: Seconds = 2.0
    """How long it may take over the answer before it is declared lost."""
    restarts: Annotated[int, Field(ge=0)] = 10
    """How often in restart_window_s an instance is started anew."""
    restart_window_s: Seconds = 600.0
    controller_s: Seconds = 600.0
    """How long gateways and instances go on without the controller, whose successor may be slow to
    start."""
    supervisor_lease_s: Seconds = 30.0
    """The cluster stops by itself so long after its serve process has vanished."""
    links: LinkLimits = LinkLimits()
    """Messages between processes."""


class AutoscalingConfig(Section):
    policy: Path | None = None
    """Policy file put in force at the start."""


class Config(Section):
    model: str = "demo"
    """The built-in "demo", a checkpoint directory, or a Hugging Face id."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where every worker can have a GPU, else cpu."""
    pools: PoolsConfig = Field(default_factory=PoolsConfig)
    slo: SloConfig = Field(default_factory=SloConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    transfer: TransferConfig = TransferConfig()
    migration: MigrationConfig = Field(default_factory=MigrationConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    autoscaling: AutoscalingConfig = Field(default_factory=AutoscalingConfig)
    predicted: dict[str, Any] | None = None
    """What the plan behind it expects; the live page shows it beside what is observed."""

    @model_validator(mode="after")
    def _bounds_are_bounds(self) -> Self:
        for path, value in _numbers(self, ""):
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{path} is {value}: must be finite and not negative")
        return self

    @model_validator(mode="after")
    def _checksums_are_of_plain_kv(self) -> Self:
        if self.transfer.checksums and self.transfer.compression != "off":
            raise ValueError(
                "transfer.checksums needs transfer.compression to be off: coded KV differs"
            )
        return self

    @model_validator(mode="after")
    def _kv_is_narrow_on_gpus_and_coded_once(self) -> Self:
        if self.engine.kv_dtype != "auto" and self.device == "cpu":
            raise ValueError("engine.kv_dtype must be auto where device is cpu")
        if self.engine.kv_dtype != "auto" and self.transfer.compression != "off":
            raise ValueError("engine.kv_dtype must be auto where transfer.compression codes KV")
        return self

    @model_validator(mode="after")
    def _shared_weights_are_alike(self) -> Self:
        if not self.engine.share_weights:
            return self
        if self.device == "cpu":
            raise ValueError("engine.share_weights must be false where device is cpu")
        shapes = self.pools.all_shapes
        if any(shape.resources.get("GPU", 1.0) >= 1.0 for shape in shapes):
            raise ValueError("engine.share_weights needs every pool's resources.GPU to be below 1")
        if len({(shape.tensor_parallel, shape.pipeline_parallel) for shape in shapes}) > 1:
            raise ValueError(
                "engine.share_weights needs tensor_parallel and pipeline_parallel to be the same in"
                " every pool"
            )
        return self

    @property
    def served_name(self) -> str:
        return self.gateway.served_name or Path(self.model).name


def parse_config(values: dict[str, Any]) -> Config:
    """A checked config, or one BadConfig that names the path, the value and the rule."""
    try:
        return Config.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise first_error(error, Config.model_json_schema()) from None


def read_config_values(source: str | None) -> dict[str, Any]:
    """The raw values behind what was asked for: a config file, a plan, a model, or nothing."""
    if source is None:
        return {}
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        return {"model": source}
    values = read_yaml(path)
    return plan_values(values) if isinstance(values.get("pools"), list) else values


def load_config(source: str | None = None, **overrides: Any) -> Config:
    """Reads what `tandem serve` was given; overrides are dotted paths such as gateway.host."""
    values = read_config_values(source)
    for path, value in overrides.items():
        set_value(values, path, value)
    return parse_config(values)


def set_value(values: dict[str, Any], path: str, value: Any) -> None:
    """Sets `a.b.c` in nested mappings."""
    *sections, name = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise BadConfig(section, values, "must be a mapping")
    values[name] = value


def _numbers(value: Any, path: str) -> list[tuple[str, float]]:
    """Every number below `value` with its dotted path."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [(path, value)]
    if isinstance(value, BaseModel):
        names = list(type(value).model_fields)
    elif is_dataclass(value):
        names = [entry.name for entry in fields(value)]
    else:
        return []
    found = []
    for name in names:
        found += _numbers(getattr(value, name), f"{path}.{name}" if path else name)
    return found
