"""How many instances each role should have, and the next steps towards it; decides, does nothing.

The forecast is a floor, what the signals ask for comes on top, delays and cool-down keep it from
flapping, and the budget has the last word.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING

from placement.scaling.allotment import Action, Start, Stop, Switch, Wish, steps
from placement.scaling.forecast import forecast, history_samples
from placement.scaling.policy import LATENCIES
from placement.scaling.signals import Window

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from engine.messages import Role
    from placement.scaling.policy import Forecast, Policy, RolePolicy
    from placement.scaling.signals import Observation


MOST_GROWTH = 1.5
"""Of a role by a latency signal: where queues build up, twice the wait is not twice the load."""


@dataclass(frozen=True, slots=True)
class Want:
    """What one role asks for and why, for the person who wonders."""

    role: Role
    standing: int
    asked: int
    """By signals and forecast, within limits."""
    wanted: int
    """Of that, what delays, cool-down and step limits let through."""
    why: str


@dataclass(frozen=True, slots=True)
class Decision:
    actions: tuple[Action, ...]
    wants: tuple[Want, ...]


@dataclass(slots=True)
class Rates:
    """Tokens per second in samples of equal length, for the forecast."""

    settings: Forecast
    samples: deque[float] = field(init=False)
    _tokens: float = 0.0
    _begun_s: float | None = None
    _next: float = 0.0

    def __post_init__(self) -> None:
        self.samples = deque(maxlen=history_samples(self.settings))

    def add(self, tokens: int, now: float) -> None:
        if self._begun_s is None:
            self._begun_s = now
        self._tokens += tokens
        elapsed_s = now - self._begun_s
        whole = int(elapsed_s / self.settings.sample_s)
        if whole:
            # A gap in the observations is spread evenly over the samples that it spans.
            rate = self._tokens / (whole * self.settings.sample_s)
            self.samples.extend([rate] * min(whole, self.samples.maxlen or 0))
            self._begun_s += whole * self.settings.sample_s
            self._tokens = 0.0
            self._next = forecast(list(self.samples), self.settings)

    def learn(self, samples: Iterable[float]) -> None:
        """What was seen before, oldest first."""
        self.samples.extend(samples)
        self._next = forecast(list(self.samples), self.settings)

    @property
    def ahead(self) -> float:
        return self._next


@dataclass(slots=True)
class RoleHistory:
    """What one role asked for lately, and how it changed."""

    rates: Rates
    asked: deque[tuple[float, int]] = field(default_factory=deque)
    direction: int = 0
    changed_s: float = float("-inf")
    serving: int | None = None
    served_since_s: float = float("-inf")
    """When the number of instances that serve last grew."""
    failures: int = 0
    blocked_until_s: float = float("-inf")

    def ask(self, count: int, now: float, keep_s: float) -> None:
        self.asked.append((now, count))
        # The newest of those that are too old tells what was asked at the window's beginning.
        while len(self.asked) > 1 and now - self.asked[1][0] >= keep_s:
            self.asked.popleft()

    def least(self, window_s: float, now: float) -> int | None:
        return min(self._within(window_s, now), default=None)

    def most(self, window_s: float, now: float) -> int | None:
        return max(self._within(window_s, now), default=None)

    def _within(self, window_s: float, now: float) -> list[int]:
        """From what was asked at the window's beginning on; empty if that is not known."""
        inside: list[int] = []
        for at, count in reversed(self.asked):
            inside.append(count)
            if at <= now - window_s:
                return inside
        return []

    def serves(self, count: int, now: float) -> None:
        if self.serving is not None and count > self.serving:
            self.served_since_s = now
        self.serving = count

    def changed(self, direction: int, now: float) -> None:
        self.direction, self.changed_s = direction, now


class Autoscaler:
    def __init__(self, policy: Policy, accelerators: Mapping[Role, int]) -> None:
        """`accelerators` is what one instance of each role takes."""
        self.policy, self._accelerators = policy, dict(accelerators)
        self._window = Window(policy.look_back_period_s)
        self._roles = {role: RoleHistory(Rates(policy.forecast)) for role, _ in policy.roles.named}

    def decide(self, seen: Observation) -> Decision:
        self._window.add(seen)
        wishes, wants = [], []
        for role, policy in self.policy.roles.named:
            history = self._roles[role]
            history.rates.add(_tokens(role, seen), seen.now_s)
            want, wish = self._want(role, policy, history, seen)
            wants.append(want)
            wishes.append(wish)
        own = {role for role, _ in self.policy.roles.named}
        others = sum(u.accelerators for u in seen.units if u.role not in own)
        units = [unit for unit in seen.units if unit.role in own]
        budget = self.policy.budget_accelerators - others
        actions = steps(wishes, units, budget, switch=self.policy.role_switch)
        if not self.policy.dry_run:
            self._remember(actions, seen.now_s)
        return Decision(actions, tuple(wants))

    def learn(self, role: Role, tokens_s: Iterable[float]) -> None:
        """The load of earlier days, in samples of the forecast's length, oldest first."""
        if role in self._roles:
            self._roles[role].rates.learn(tokens_s)

    def failed(self, role: Role, now: float) -> bool:
        """A start found no place; whether the role is now left alone for a while."""
        history = self._roles.get(role)
        if history is None:
            return False
        history.failures += 1
        if history.failures <= self.policy.placement_retries:
            return False
        history.failures = 0
        history.blocked_until_s = now + self.policy.placement_retry_s
        return True

    def placed(self, role: Role) -> None:
        if role in self._roles:
            self._roles[role].failures = 0

    def _want(
        self, role: Role, policy: RolePolicy, history: RoleHistory, seen: Observation
    ) -> tuple[Want, Wish]:
        now, standing = seen.now_s, len(seen.standing(role))
        least, most = policy.limits(now)
        history.serves(len(seen.serving(role)), now)
        reactive, why = self._reactive(role, policy, seen)
        if reactive > standing > 0 and now - history.served_since_s < self._window.look_back_s:
            reactive, why = standing, "waits for what new instances change"
        floor = _floor(policy, history)
        if floor > reactive:
            reactive, why = floor, f"forecast {history.rates.ahead:.0f} tokens/s"
        asked = min(max(reactive, least), most)
        if asked != reactive:
            why = f"at least {least}" if asked > reactive else f"at most {most}, for {why}"
        windows_s = (
            self.policy.zero_delay_s,
            self.policy.downscale_delay_s,
            self.policy.cooldown_s,
        )
        keep_s = max(windows_s)
        history.ask(asked, now, keep_s)
        wanted = self._settled(standing, history, now)
        wanted = self._stepped(standing, wanted, policy, history, now)
        # Limits hold at once: a schedule has begun, or an instance was lost.
        wanted = min(max(wanted, least), most)
        spare = self._spare(standing, least, history, now)
        blocked = now < history.blocked_until_s
        wish = Wish(role, self._accelerators[role], standing, wanted, least, spare, blocked)
        return Want(role, standing, asked, wanted, why), wish

    def _reactive(self, role: Role, policy: RolePolicy, seen: Observation) -> tuple[int, str]:
        """In proportion to the signal that asks for most.

        A latency that meets its target asks for nothing where something else tells the load: it
        never falls below what one step takes, however many instances there are.
        """
        serving, standing = len(seen.serving(role)), len(seen.standing(role))
        if not standing:
            work = not seen.idle
            return int(work), "work waits" if work else "nothing to do"
        asks = []
        for signal in policy.heeded:
            value = self._window.value(signal, role, policy)
            if value is None:
                continue
            share = value / signal.target
            if signal.signal in LATENCIES:
                share = min(share, MOST_GROWTH)
            near = abs(share - 1.0) <= self.policy.hysteresis
            asked = standing if near else _in_proportion(serving, standing, share)
            if signal.signal in LATENCIES and share <= 1.0 and policy.measures_load:
                asked = 0
            asks.append((asked, f"{signal.signal.value} {value:.3g} of {signal.target:g}"))
        return max(asks, default=(standing, "no signal"), key=lambda ask: ask[0])

    def _settled(self, standing: int, history: RoleHistory, now: float) -> int:
        """What has been asked for during the whole of the delay."""
        up = history.least(self.policy.upscale_delay_s, now)
        if up is not None and up > standing:
            return up
        down = history.most(self.policy.downscale_delay_s, now)
        if down is None or down >= standing or self._just_fell(history, now):
            return standing
        if down == 0 and history.most(self.policy.zero_delay_s, now) != 0:
            return 1
        return down

    def _just_fell(self, history: RoleHistory, now: float) -> bool:
        """What a stop does to the signals is seen for a whole window before the next one."""
        return history.direction < 0 and now - history.changed_s < self._window.look_back_s

    def _stepped(
        self, standing: int, wanted: int, policy: RolePolicy, history: RoleHistory, now: float
    ) -> int:
        """No turn within the cool-down, and no long stride."""
        if wanted != standing and self._cooling(history, 1 if wanted > standing else -1, now):
            return standing
        return min(max(wanted, standing - policy.max_step_down), standing + policy.max_step_up)

    def _spare(self, standing: int, least: int, history: RoleHistory, now: float) -> int:
        """Moving an instance to where it is needed does not wait as long as stopping it, but a
        short lull must not send back and forth what both roles need."""
        asked = history.most(max(self.policy.upscale_delay_s, self.policy.cooldown_s), now)
        if asked is None or self._cooling(history, -1, now):
            return 0
        return max(standing - max(asked, least), 0)

    def _cooling(self, history: RoleHistory, direction: int, now: float) -> bool:
        turned = history.direction == -direction
        return turned and now - history.changed_s < self.policy.cooldown_s

    def _remember(self, actions: Iterable[Action], now: float) -> None:
        for action in actions:
            match action:
                case Start(role):
                    self._roles[role].changed(1, now)
                case Stop(_, role):
                    self._roles[role].changed(-1, now)
                case Switch(_, source, target):
                    self._roles[source].changed(-1, now)
                    self._roles[target].changed(1, now)


def _in_proportion(serving: int, standing: int, share: float) -> int:
    """Growth counts from what serves, so that those still starting are not asked for twice."""
    # Rounding error must not ask for one more.
    asked = ceil(serving * share - 1e-9)
    return max(asked, standing) if share > 1.0 else asked


def _floor(policy: RolePolicy, history: RoleHistory) -> int:
    if policy.capacity_tokens_s is None:
        return 0
    return ceil(history.rates.ahead / policy.capacity_tokens_s - 1e-9)


def _tokens(role: Role, seen: Observation) -> int:
    """What the role works through: a mixed instance does both."""
    prompt = seen.prompt_tokens if role.prefills else 0
    return prompt + (seen.output_tokens if role.decodes else 0)
