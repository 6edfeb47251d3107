"""What an operator allows the autoscaler to do: the records behind a policy file."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, ValidationInfo, field_validator, model_validator

from engine.messages import Role
from placement.scaling.fields import Instances, Positive, PositiveSeconds, Seconds, Section, Steps
from placement.scaling.schedule import check_cron, is_open
from placement.scaling.share_policy import SmShares  # noqa: TC001  pydantic reads it

if TYPE_CHECKING:
    from collections.abc import Mapping


class SignalName(str, Enum):
    """What a role is scaled on; all grow with the load."""

    TTFT_ATTAINMENT = "ttft_attainment"
    TPOT_ATTAINMENT = "tpot_attainment"
    QUEUED_PROMPT_TOKENS = "queued_prompt_tokens"
    PREDICTED_WAIT_S = "predicted_wait_s"
    KV_USE = "kv_use"
    BATCH = "batch"
    ONGOING_REQUESTS = "ongoing_requests"


LATENCIES = (SignalName.TTFT_ATTAINMENT, SignalName.TPOT_ATTAINMENT)
PREFILL_SIGNALS = (
    SignalName.TTFT_ATTAINMENT,
    SignalName.QUEUED_PROMPT_TOKENS,
    SignalName.PREDICTED_WAIT_S,
    SignalName.ONGOING_REQUESTS,
)
DECODE_SIGNALS = (
    SignalName.TPOT_ATTAINMENT,
    SignalName.KV_USE,
    SignalName.BATCH,
    SignalName.ONGOING_REQUESTS,
)


class Signal(Section):
    signal: SignalName
    """An attainment is its percentile over the SLO's target: at 1 just that share meets it.
    Tokens, sequences and requests count per instance, kv_use is a share of the blocks."""
    target: Positive
    """The value to hold; instances are added in proportion beyond it."""
    percentile: Annotated[float, Field(gt=0.0, lt=100.0)] = 90.0
    """Of the latencies behind an attainment; other signals are averaged."""

    @field_validator("target")
    @classmethod
    def _share_is_a_share(cls, target: float, given: ValidationInfo) -> float:
        if given.data.get("signal") is SignalName.KV_USE and target > 1.0:
            raise ValueError("kv_use is a share: must be at most 1")
        return target


class Schedule(Section):
    cron: str
    """When it begins: minute, hour, day of month, month, day of week."""
    duration_s: PositiveSeconds
    """How long it lasts."""
    timezone: str = "UTC"
    """The cron expression's, such as Europe/Berlin."""
    min_replicas: Instances
    """At least so many meanwhile, in place of the role's own."""
    max_replicas: Instances | None = None
    """At most so many meanwhile; the role's own if not given."""

    @field_validator("cron")
    @classmethod
    def _cron_parses(cls, cron: str) -> str:
        check_cron(cron)
        return cron

    @field_validator("timezone")
    @classmethod
    def _timezone_exists(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError("no such time zone") from error
        return timezone

    @field_validator("max_replicas")
    @classmethod
    def _max_is_not_below_min(cls, most: int | None, given: ValidationInfo) -> int | None:
        return None if most is None else _not_below_min(most, given)

    def is_open(self, wall_s: float) -> bool:
        return is_open(self.cron, self.timezone, self.duration_s, wall_s)


class PredictorName(str, Enum):
    CONSTANT = "constant"
    LINEAR = "linear"
    HOLT_WINTERS = "holt_winters"
    KALMAN = "kalman"


class Forecast(Section):
    predictor: PredictorName = PredictorName.CONSTANT
    """constant repeats the latest load, linear extends its line, holt_winters its seasons, and
    kalman tracks level and slope through noise."""
    horizon_s: PositiveSeconds = 60.0
    """How far ahead to look: what starting an instance takes."""
    sample_s: PositiveSeconds = 10.0
    """The history's resolution."""
    season_s: PositiveSeconds | None = None
    """The length of a season, for holt_winters."""
    headroom: Annotated[float, Field(ge=0.0, le=10.0)] = 0.1
    """Added to the forecast, as a share of it."""

    @field_validator("season_s")
    @classmethod
    def _season_has_samples(cls, season_s: float | None, given: ValidationInfo) -> float | None:
        seasonal = given.data.get("predictor") is PredictorName.HOLT_WINTERS
        if seasonal and season_s is None:
            raise ValueError("holt_winters needs the length of a season")
        if not seasonal and season_s is not None:
            raise ValueError("only holt_winters has seasons")
        sample_s = given.data.get("sample_s")
        if season_s is not None and sample_s is not None and not 2 <= season_s / sample_s <= 2000:
            raise ValueError(f"must be between 2 and 2000 samples of {sample_s} s")
        return season_s


class RolePolicy(Section):
    min_replicas: Instances = 1
    """Instances at least; 0 lets the role scale to zero."""
    max_replicas: Instances
    """Never more than this, whatever the signals say."""
    signals: Annotated[tuple[Signal, ...], Field(max_length=6)] = ()
    """The one that asks for most decides."""
    target_ongoing_requests: Positive | None = None
    """Requests to hold per instance, queued and running: short for a signal of that name."""
    capacity_tokens_s: Positive | None = None
    """Tokens that one instance handles within the SLO, from `tandem profile` or a plan; with it
    the forecast is a floor under what the signals ask for."""
    max_step_up: Steps = 4
    """Instances added at most by one decision."""
    max_step_down: Steps = 1
    """Instances taken away at most by one decision."""
    schedules: Annotated[tuple[Schedule, ...], Field(max_length=64)] = ()
    """The first that is open sets the limits."""

    @field_validator("max_replicas")
    @classmethod
    def _max_is_not_below_min(cls, most: int, given: ValidationInfo) -> int:
        return _not_below_min(most, given)

    @field_validator("signals")
    @classmethod
    def _named_once(cls, signals: tuple[Signal, ...]) -> tuple[Signal, ...]:
        names = [signal.signal.value for signal in signals]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is given twice")
        return signals

    @field_validator("target_ongoing_requests")
    @classmethod
    def _said_once(cls, target: float | None, given: ValidationInfo) -> float | None:
        named = {signal.signal for signal in given.data.get("signals", ())}
        if target is not None and SignalName.ONGOING_REQUESTS in named:
            raise ValueError("ongoing_requests is among the signals already")
        return target

    @field_validator("capacity_tokens_s")
    @classmethod
    def _waits_are_predictable(
        cls, capacity_tokens_s: float | None, given: ValidationInfo
    ) -> float | None:
        waits = [
            s for s in given.data.get("signals", ()) if s.signal is SignalName.PREDICTED_WAIT_S
        ]
        if waits and capacity_tokens_s is None:
            raise ValueError("predicted_wait_s needs it")
        return capacity_tokens_s

    @field_validator("schedules")
    @classmethod
    def _within_the_role(
        cls, schedules: tuple[Schedule, ...], given: ValidationInfo
    ) -> tuple[Schedule, ...]:
        most = given.data.get("max_replicas", 0)
        for number, schedule in enumerate(schedules):
            if schedule.max_replicas is None and schedule.min_replicas > most:
                raise ValueError(
                    f"min_replicas {schedule.min_replicas} of schedule {number} is above the "
                    f"role's max_replicas {most}; give the schedule its own"
                )
        return schedules

    @property
    def heeded(self) -> tuple[Signal, ...]:
        """The signals, however they are given."""
        if self.target_ongoing_requests is None:
            return self.signals
        ongoing = Signal(signal=SignalName.ONGOING_REQUESTS, target=self.target_ongoing_requests)
        return (*self.signals, ongoing)

    @property
    def measures_load(self) -> bool:
        """Whether anything but latencies tells how much there is to do."""
        others = [signal for signal in self.heeded if signal.signal not in LATENCIES]
        return self.capacity_tokens_s is not None or bool(others)

    def limits(self, wall_s: float) -> tuple[int, int]:
        """Least and most instances now."""
        for schedule in self.schedules:
            if schedule.is_open(wall_s):
                most = schedule.max_replicas
                return schedule.min_replicas, self.max_replicas if most is None else most
        return self.min_replicas, self.max_replicas


def _not_below_min(most: int, given: ValidationInfo) -> int:
    least = given.data.get("min_replicas", 0)
    if most < least:
        raise ValueError(f"must not be below min_replicas, which is {least}")
    return most


def _only(role: RolePolicy | None, name: str, allowed: tuple[SignalName, ...]) -> RolePolicy | None:
    for signal in role.signals if role else ():
        if signal.signal not in allowed:
            names = ", ".join(one.value for one in allowed)
            raise ValueError(f"{signal.signal.value} does not apply to {name}; one of {names}")
    return role


class RolePolicies(Section):
    """A role that is not named is left alone."""

    prefill: RolePolicy | None = None
    decode: RolePolicy | None = None
    mixed: RolePolicy | None = None

    @field_validator("prefill")
    @classmethod
    def _prefill_signals(cls, role: RolePolicy | None) -> RolePolicy | None:
        return _only(role, "prefill", PREFILL_SIGNALS)

    @field_validator("decode")
    @classmethod
    def _decode_signals(cls, role: RolePolicy | None) -> RolePolicy | None:
        return _only(role, "decode", DECODE_SIGNALS)

    @model_validator(mode="after")
    def _names_one(self) -> RolePolicies:
        if not self.named:
            raise ValueError("must name prefill, decode or mixed")
        return self

    def of(self, role: Role) -> RolePolicy | None:
        found: RolePolicy | None = getattr(self, role.value)
        return found

    @property
    def named(self) -> tuple[tuple[Role, RolePolicy], ...]:
        return tuple((role, found) for role in Role if (found := self.of(role)) is not None)


class ReplanMode(str, Enum):
    ADVISE = "advise"
    APPLY = "apply"


class Replan(Section):
    """Another plan once requests are not what they were; see docs/planning.md for the test."""

    mode: ReplanMode = ReplanMode.ADVISE
    """advise only tells; apply makes the plan's counts the roles' minimums, which are then
    reached by switches, stops and starts within the budget."""
    device: Annotated[str, Field(min_length=1, max_length=100)]
    """The accelerators' name in the planner's catalog."""
    profile: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """What `tandem profile` measured, a file on the controller's node."""
    window_s: PositiveSeconds = 600.0
    """Requests of this long are compared with those that the last plan was made for."""
    least_requests: Annotated[int, Field(ge=50, le=4000)] = 200
    """In a window, before it is compared."""
    interval_s: PositiveSeconds = 600.0
    """Between two plans at least."""
    plan_s: PositiveSeconds = 300.0
    """How long the planner may take."""


class Policy(Section):
    name: Annotated[str, Field(min_length=1, max_length=100)] = "policy"
    """Shown in the status and in events."""
    dry_run: bool = False
    """Decide and report, but change nothing."""
    metrics_interval_s: PositiveSeconds = 2.0
    """Between two decisions."""
    look_back_period_s: PositiveSeconds = 30.0
    """Signals are taken over this window."""
    upscale_delay_s: Seconds = 10.0
    """Signals must ask for more this long before instances are added."""
    downscale_delay_s: Seconds = 300.0
    """Signals must ask for less this long before instances are taken away."""
    downscale_to_zero_delay_s: Seconds | None = None
    """The same for a role's last instance; downscale_delay_s if not given."""
    cooldown_s: Seconds = 30.0
    """After a change of a role, its next change in the other direction waits this long."""
    hysteresis: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Within this share of its target a signal asks for nothing."""
    role_switch: bool = True
    """Turn instances of one role into another's rather than start and stop them."""
    placement_retries: Annotated[int, Field(ge=0, le=100)] = 3
    """Failed starts in a row after which a role is not grown for placement_retry_s."""
    placement_retry_s: PositiveSeconds = 60.0
    budget_accelerators: Annotated[int, Field(ge=1, le=1_000_000)]
    """All roles together never use more, switching and starting included."""
    roles: RolePolicies
    """What is scaled."""
    forecast: Forecast = Field(default_factory=Forecast)
    """The load ahead, a floor where a role's capacity_tokens_s is given."""

    replan: Replan | None = None
    """Without it nobody plans again."""
    sm_shares: SmShares | None = None
    """Without it pools keep the sm_share of the config."""

    @field_validator("look_back_period_s")
    @classmethod
    def _window_holds_a_look(cls, look_back_s: float, given: ValidationInfo) -> float:
        interval_s = given.data.get("metrics_interval_s", 0.0)
        if look_back_s < interval_s:
            raise ValueError(f"must not be below metrics_interval_s, which is {interval_s}")
        return look_back_s

    @field_validator("downscale_delay_s")
    @classmethod
    def _falls_slower_than_it_grows(cls, down_s: float, given: ValidationInfo) -> float:
        up_s = given.data.get("upscale_delay_s", 0.0)
        if down_s < up_s:
            raise ValueError(f"must not be below upscale_delay_s, which is {up_s}, or it flaps")
        return down_s

    @field_validator("downscale_to_zero_delay_s")
    @classmethod
    def _last_goes_latest(cls, zero_s: float | None, given: ValidationInfo) -> float | None:
        down_s = given.data.get("downscale_delay_s", 0.0)
        if zero_s is not None and zero_s < down_s:
            raise ValueError(f"must not be below downscale_delay_s, which is {down_s}")
        return zero_s

    @field_validator("roles")
    @classmethod
    def _least_fits(cls, roles: RolePolicies, given: ValidationInfo) -> RolePolicies:
        """An instance takes one accelerator at least."""
        budget = given.data.get("budget_accelerators")
        least = sum(role.min_replicas for _, role in roles.named)
        if budget is not None and least > budget:
            raise ValueError(f"min_replicas add up to {least}, above the budget of {budget}")
        return roles

    @field_validator("sm_shares")
    @classmethod
    def _roles_keep_their_shares(
        cls, sm_shares: SmShares | None, given: ValidationInfo
    ) -> SmShares | None:
        if sm_shares is not None and given.data.get("role_switch"):
            raise ValueError("role_switch must be false: what is turned would keep its share")
        return sm_shares

    def at_least(self, counts: Mapping[Role, int]) -> Policy:
        """With other minimums, as far as each role's maximum and the budget allow."""
        left = self.budget_accelerators
        roles: dict[str, RolePolicy] = {}
        for role, found in self.roles.named:
            least = min(counts.get(role, 0), found.max_replicas, left)
            left -= least
            roles[role.value] = found.model_copy(update={"min_replicas": least})
        return self.model_copy(update={"roles": self.roles.model_copy(update=roles)})

    @property
    def zero_delay_s(self) -> float:
        given = self.downscale_to_zero_delay_s
        return self.downscale_delay_s if given is None else given
