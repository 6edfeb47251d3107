"""The controller's side of autoscaling: a policy in force, and what is done for it."""

import asyncio
from dataclasses import replace

import pytest

from cluster.control.policy_source import PolicyText
from cluster.control.scaling import Scaling, Usage
from cluster.watching.usage import UsageReporter
from engine.clock import VirtualClock
from engine.errors import BadConfig
from engine.events import Timeline
from engine.messages import Role
from engine.slo import Slo
from placement.scaling.drift import Shape
from placement.scaling.signals import Phase, Unit
from tests.cluster.watching import ended, opened
from tests.placement.fleet import busy

POLICY = """\
name: test
budget_accelerators: 4
upscale_delay_s: 0
downscale_delay_s: 0
cooldown_s: 0
metrics_interval_s: 1
look_back_period_s: 1
placement_retries: 0
placement_retry_s: 30
roles:
  prefill:
    min_replicas: 1
    max_replicas: 4
    signals: [{signal: queued_prompt_tokens, target: 1000}]
  decode:
    min_replicas: 1
    max_replicas: 4
    signals: [{signal: batch, target: 16}]
"""


class Fleet:
    """Instances that come and go at once, with a record of what was asked."""

    def __init__(self, **use: float) -> None:
        self.use = {"prefill-0": 0.5, "decode-0": 0.5} | use
        self.units_here = {name: unit(name) for name in self.use}
        self.notes = []
        self.shares = {}
        self.reshared = []

    def units(self):
        return tuple(
            busy(one, self.use.get(name, 0.5)) if one.phase is Phase.READY else one
            for name, one in sorted(self.units_here.items())
        )

    def grow(self, role):
        name = f"{role.value}-{len(self.units_here)}"
        self.units_here[name] = replace(unit(name), phase=Phase.STARTING)
        return name

    def retire(self, name):
        self.units_here[name] = replace(self.units_here[name], phase=Phase.DRAINING)

    def turn(self, name, role):
        self.units_here[name] = replace(self.units_here[name], role=role)

    def sm_shares(self):
        return self.shares

    def reshare(self, shares):
        self.reshared.append(shares)
        self.shares = {**self.shares, **shares}

    def note(self, kind, subject, text, **fields):
        self.notes.append((kind, subject, text))


def unit(name: str) -> Unit:
    return Unit(name, Role(name.partition("-")[0]), 1, Phase.READY)


def scaling(fleet: Fleet, text: str = POLICY) -> tuple[Scaling, VirtualClock]:
    clock = VirtualClock(100.0)
    made = Scaling(fleet, dict.fromkeys(Role, 1), fleet.note, clock)
    if text:
        made.apply(PolicyText(text))
    return made, clock


async def test_it_starts_what_is_lacking_and_says_why():
    fleet = Fleet(**{"prefill-0": 1.0})
    made, _ = scaling(fleet)
    await made.look()
    assert fleet.units_here["prefill-2"].phase is Phase.STARTING
    assert ("scale", "prefill-2", "start") in fleet.notes


async def test_a_failed_start_is_retried_after_the_pause_and_not_before():
    fleet = Fleet(**{"prefill-0": 1.0})
    made, clock = scaling(fleet)
    await made.look()
    del fleet.units_here["prefill-2"]
    assert made.failed("prefill-2")
    assert not made.failed("decode-0"), "another's failure is not the autoscaler's"
    assert ("scale", "prefill", "no more starts for a while") in fleet.notes
    clock.advance_to(120.0)
    await made.look()
    assert len(fleet.units_here) == 2
    clock.advance_to(131.0)
    await made.look()
    assert len(fleet.units_here) == 3


async def test_it_switches_roles_at_the_budget():
    fleet = Fleet(**{"prefill-0": 1.0, "decode-0": 0.2, "decode-1": 0.2, "decode-2": 0.2})
    made, _ = scaling(fleet)
    await made.look()
    assert sum(one.role is Role.PREFILL for one in fleet.units_here.values()) == 2
    assert ("scale", "decode-0", "switch") in fleet.notes


async def test_a_decision_about_a_fleet_that_has_changed_is_dropped():
    fleet = Fleet(**{"prefill-0": 1.0})
    made, _ = scaling(fleet)
    looks = iter([fleet.units(), fleet.units()[:1]])
    fleet.units = lambda: next(looks)
    await made.look()
    assert len(fleet.units_here) == 2


async def test_a_dry_run_says_once_what_it_would_do():
    fleet = Fleet(**{"prefill-0": 1.0})
    made, clock = scaling(fleet, POLICY + "dry_run: true\n")
    await made.look()
    clock.advance_to(101.0)
    await made.look()
    assert len(fleet.units_here) == 2
    assert [text for _, _, text in fleet.notes] == ["applied", "would act"]


async def test_a_bad_policy_is_refused_and_the_running_one_stays():
    made, _ = scaling(Fleet())
    version = made.version
    with pytest.raises(BadConfig, match="line 2"):
        made.apply(PolicyText(POLICY.replace("budget_accelerators", "budget")))
    assert made.version == version


async def test_a_new_policy_is_told_by_its_version_and_what_changes():
    made, _ = scaling(Fleet())
    lines = made.apply(
        PolicyText(POLICY.replace("budget_accelerators: 4", "budget_accelerators: 6"))
    )
    assert lines == [f"version: {made.version}", "budget_accelerators: 4 -> 6"]


async def test_a_new_controller_learns_the_policy_from_a_gateway():
    made, _ = scaling(Fleet(), text="")
    made.told("gateway-0", Usage())
    assert made.version is None
    made.told("gateway-0", Usage(policy=PolicyText(POLICY)))
    first = made.version
    made.told("gateway-0", Usage(policy=PolicyText(POLICY)))
    assert made.version == first is not None


async def test_of_two_gateways_policies_the_one_applied_last_holds():
    made, _ = scaling(Fleet(), text="")
    dry = PolicyText(POLICY + "dry_run: true\n", 200.0)
    for policy in (PolicyText(POLICY), dry, PolicyText(POLICY), dry):
        made.told("gateway-0", Usage(policy=policy))
    assert made.status.dry_run


async def test_what_gateways_tell_is_counted_once():
    made, _ = scaling(Fleet())
    made.told("gateway-0", Usage(3, (0.5,), (0.4,), 100, 10))
    made.told("gateway-0", Usage(2, (0.7,), (), 50, 5))
    seen, again = made._observe(), made._observe()
    assert (seen.waiting_requests, seen.ttft_shares, seen.prompt_tokens) == (2, (0.5, 0.7), 150)
    assert (again.waiting_requests, again.ttft_shares, again.prompt_tokens) == (2, (), 0)


async def test_what_waited_at_a_lost_gateway_waits_no_more():
    made, _ = scaling(Fleet())
    made.told("gateway-0", Usage(3, prompt_tokens=100))
    made.told("gateway-1", Usage(2, prompt_tokens=50))
    made.gateway_lost("gateway-0")
    made.gateway_lost("gateway-2")
    seen = made._observe()
    assert (seen.waiting_requests, seen.prompt_tokens) == (2, 150)
    made.gateway_lost("gateway-1")
    assert made._observe().waiting_requests == 0


async def test_the_loop_waits_for_a_policy_and_then_looks():
    fleet = Fleet(**{"prefill-0": 1.0})
    made, _ = scaling(fleet, text="")
    acted = asyncio.Event()
    grow = fleet.grow
    fleet.grow = lambda role: (acted.set(), grow(role))[1]
    task = asyncio.create_task(made.run())
    made.apply(PolicyText(POLICY))
    await acted.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cluster_that_shuts_down_starts_nothing():
    fleet = Fleet(**{"prefill-0": 1.0})
    made, _ = scaling(fleet)
    made.close()
    await made.look()
    await made.run()
    assert len(fleet.units_here) == 2


def test_a_report_begins_the_next_one_at_nothing():
    reporter = UsageReporter("gateway-0", None)
    reporter.streamed((0.01, 0.02))
    policy = PolicyText("text")
    assert reporter.take(4, policy) == Usage(4, output_tokens=2, policy=policy)
    assert reporter.take(0, policy) == Usage(policy=policy)


def test_a_late_first_token_is_told_before_its_answer_ends_and_only_once():
    reporter, timeline, slo = UsageReporter("gateway-0", None), Timeline(100.0), Slo(2.0, 0.1)
    reporter.opened(opened("r", timeline=timeline, slo=slo))
    assert reporter.take(0) == Usage(prompt_tokens=16)
    timeline.first_token_s = 103.0
    assert reporter.take(0) == Usage(ttft_shares=(1.5,))
    timeline.finished_s = 104.0
    reporter.ended(ended("r", timeline=timeline, slo=slo))
    assert reporter.take(0) == Usage(tpot_shares=(1.0,), ended=(Shape(16, 11),))
    assert reporter.take(0) == Usage()


def test_a_request_that_ends_between_two_reports_is_told_whole_and_a_failed_one_is_forgotten():
    reporter, timeline, slo = UsageReporter("gateway-0", None), Timeline(100.0), Slo(2.0, 0.1)
    reporter.opened(opened("r", timeline=timeline, slo=slo))
    reporter.opened(opened("failed", timeline=Timeline(100.0), slo=slo))
    timeline.first_token_s, timeline.finished_s = 101.0, 102.0
    reporter.ended(ended("r", timeline=timeline, slo=slo, output_tokens=1))
    reporter.ended(ended("failed", "error", timeline=Timeline(100.0), slo=slo))
    assert reporter.take(0) == Usage(ttft_shares=(0.5,), prompt_tokens=32, ended=(Shape(16, 1),))
    assert reporter.take(0) == Usage()


SHARING = (
    POLICY.replace("metrics_interval_s", "role_switch: false\nmetrics_interval_s")
    + "sm_shares: {delay_s: 0, interval_s: 100}\n"
)
EVEN = {Role.PREFILL: 0.5, Role.DECODE: 0.5}


def sharing(fleet: Fleet, text: str = SHARING) -> Scaling:
    fleet.shares = dict(EVEN)
    return scaling(fleet, text)[0]


async def test_shares_of_multiprocessors_follow_who_misses_its_target():
    fleet = Fleet()
    made = sharing(fleet)
    made.told("gateway-0", Usage(ttft_shares=(1.5,) * 9, tpot_shares=(0.5,) * 9))
    await made.look()
    assert fleet.reshared == [{Role.DECODE: 0.4, Role.PREFILL: 0.6}]
    assert ("scale", "test", "move shares") in fleet.notes
    made.told("gateway-0", Usage(ttft_shares=(1.5,) * 9, tpot_shares=(0.5,) * 9))
    await made.look()
    assert len(fleet.reshared) == 1, "the next move keeps its distance"


async def test_a_dry_run_only_tells_of_shares():
    fleet = Fleet()
    made = sharing(fleet, SHARING.replace("name: test", "name: test\ndry_run: true"))
    made.told("gateway-0", Usage(ttft_shares=(1.5,) * 9, tpot_shares=(0.5,) * 9))
    await made.look()
    assert fleet.reshared == []
    assert ("scale", "test", "would move shares") in fleet.notes


async def test_shares_move_only_while_both_roles_have_one():
    fleet = Fleet()
    made = sharing(fleet)
    del fleet.shares[Role.DECODE]
    made.told("gateway-0", Usage(ttft_shares=(1.5,) * 9, tpot_shares=(0.5,) * 9))
    await made.look()
    assert fleet.reshared == []


def test_a_policy_that_moves_shares_is_refused_where_nobody_has_any():
    with pytest.raises(BadConfig, match=r"needs pools\.prefill\.sm_share"):
        scaling(Fleet(), SHARING)
    with pytest.raises(BadConfig, match="role_switch must be false"):
        sharing(Fleet(), SHARING.replace("role_switch: false", "role_switch: true"))
