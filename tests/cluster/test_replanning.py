"""Planning again when the workload drifts, on a virtual clock and with a planner that waits."""

import asyncio

import pytest
import yaml

from cluster.cli.status import as_document, draw
from cluster.config import Config
from cluster.control.policy_source import PolicyText
from cluster.control.replanning import Planned, PlannerProcess, fleet_line, workload_lines
from cluster.control.scaling import Scaling, Usage
from cluster.policy_file import parse_policy
from cluster.rpc import tandem_pb2 as pb
from engine.clock import VirtualClock
from engine.errors import BadConfig, PlannerFailed
from engine.messages import Role
from placement.scaling.drift import Profiled, Shape
from placement.scaling.policy import Replan
from placement.workload_files import read_workload
from tests.cluster.test_scaling import POLICY, Fleet

REPLAN = "replan: {device: cpu-core, window_s: 100, least_requests: 50, interval_s: 500, mode: %s}"
SHORT, LONG = Shape(100, 20), Shape(100, 200)
SPLIT = Planned({Role.PREFILL: 1, Role.DECODE: 3}, {Role.PREFILL: 1, Role.DECODE: 1}, "why")


class FakePlanner:
    """Answers when told to."""

    def __init__(self, answer) -> None:
        self.answer, self.asked, self.may_answer = answer, [], asyncio.Event()

    async def plan(self, seen, policy):
        self.asked.append(seen)
        await self.may_answer.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Scene:
    def __init__(self, mode: str, answer=SPLIT) -> None:
        self.fleet, self.clock, self.planner = Fleet(), VirtualClock(0.0), FakePlanner(answer)
        accelerators = dict.fromkeys(Role, 1)
        self.scaling = Scaling(self.fleet, accelerators, self.fleet.note, self.clock, self.planner)
        self.scaling.apply(PolicyText(POLICY + REPLAN % mode))

    async def go_on(self, shape: Shape, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.advance_to(self.clock.now() + 1.0)
            self.scaling.told("gateway-0", Usage(ended=(shape, shape)))
            await self.scaling.look()

    async def settle(self) -> None:
        self.planner.may_answer.set()
        await self.scaling._planning

    def notes(self, kind: str) -> list[str]:
        return [text for of, _, text in self.fleet.notes if of == kind]

    def count(self, role: Role) -> int:
        return sum(one.role is role for one in self.fleet.units_here.values())


async def test_a_drift_is_planned_for_without_holding_up_the_loop_and_then_applied():
    scene = Scene("apply")
    await scene.go_on(SHORT, 110)
    assert scene.planner.asked == []
    await scene.go_on(LONG, 60)
    assert scene.notes("plan") == ["drifted"]
    (seen,) = scene.planner.asked
    assert LONG in seen.requests, "the loop went on while the planner was at work"
    assert scene.count(Role.DECODE) == 1
    await scene.settle()
    assert scene.notes("plan") == ["drifted", "applied"]
    await scene.go_on(LONG, 5)
    assert (scene.count(Role.PREFILL), scene.count(Role.DECODE)) == (1, 3)


async def test_each_step_stays_within_the_budget():
    greedy = Planned({Role.PREFILL: 9, Role.DECODE: 9}, SPLIT.accelerators, "why")
    scene = Scene("apply", greedy)
    await scene.go_on(SHORT, 110)
    await scene.go_on(LONG, 60)
    await scene.settle()
    for _ in range(20):
        await scene.go_on(LONG, 1)
        assert len(scene.fleet.units_here) <= 4


async def test_advice_changes_nothing():
    scene = Scene("advise")
    await scene.go_on(SHORT, 110)
    await scene.go_on(LONG, 60)
    await scene.settle()
    before = dict(scene.fleet.units_here)
    await scene.go_on(LONG, 20)
    assert scene.notes("plan") == ["drifted", "advised"]
    assert scene.fleet.units_here == before


async def test_a_plan_with_other_parallelism_is_only_advised():
    wide = Planned({Role.PREFILL: 1, Role.DECODE: 1}, {Role.PREFILL: 2, Role.DECODE: 1}, "why")
    scene = Scene("apply", wide)
    await scene.go_on(SHORT, 110)
    await scene.go_on(LONG, 60)
    await scene.settle()
    assert scene.notes("plan") == ["drifted", "advised"]


async def test_a_planner_that_fails_is_told_of_and_asked_again_after_the_interval():
    scene = Scene("apply", PlannerFailed("no plan meets the targets"))
    await scene.go_on(SHORT, 110)
    await scene.go_on(LONG, 60)
    await scene.settle()
    assert scene.notes("plan") == ["drifted", "no plan"]
    await scene.go_on(LONG, 300)
    assert len(scene.planner.asked) == 1
    await scene.go_on(LONG, 250)
    await scene.settle()
    assert scene.notes("plan") == ["drifted", "no plan"] * 2


async def test_what_was_applied_is_the_new_normal():
    scene = Scene("apply")
    await scene.go_on(SHORT, 110)
    await scene.go_on(LONG, 200)
    await scene.settle()
    await scene.go_on(LONG, 700)
    assert scene.notes("plan").count("drifted") <= 2
    assert scene.notes("plan")[-1] == "applied"


async def test_a_drift_is_told_once_however_long_its_plan_takes():
    scene = Scene("apply")
    await scene.go_on(SHORT, 110)
    await scene.go_on(LONG, 1200)
    assert scene.notes("plan") == ["drifted"]
    await scene.settle()
    assert scene.notes("plan") == ["drifted", "applied"]


async def test_a_new_policy_ignores_what_was_planned_for_the_old_one():
    scene = Scene("apply")
    await scene.go_on(SHORT, 110)
    await scene.go_on(LONG, 60)
    scene.scaling.apply(PolicyText(POLICY))
    await scene.settle()
    assert "applied" not in scene.notes("plan")


def test_without_a_planner_such_a_policy_is_refused():
    fleet = Fleet()
    made = Scaling(fleet, dict.fromkeys(Role, 1), fleet.note, VirtualClock(0.0))
    with pytest.raises(BadConfig, match="replan"):
        made.apply(PolicyText(POLICY + REPLAN % "apply"))
    assert made.status is None


def test_the_status_names_the_policy_and_its_version():
    scene = Scene("advise")
    status = scene.scaling.status
    assert (status.name, status.replan, len(status.version)) == ("test", "advise", 12)
    reply = pb.StatusReply(policy=pb.PolicyStatus(name="test", version=status.version))
    assert as_document(reply)["policy"]["version"] == status.version
    assert as_document(pb.StatusReply())["policy"] is None
    assert draw(as_document(reply)).renderables


def test_the_requests_seen_become_a_workload_that_the_planner_reads(tmp_path):
    seen = Profiled((Shape(100, 20), Shape(80, 7, 64)), 4.0)
    path = tmp_path / "load.csv"
    path.write_text("\n".join(workload_lines(seen)))
    load = read_workload(path)
    assert load.prompt_tokens.tolist() == [100, 80]
    assert load.prefix_tokens.tolist() == [0, 64]
    assert load.rate_rps == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("device", "profile", "devices"),
    [("cpu-core", None, 6), ("cpu-core", "demo.json", 12), ("a100-80gb", "demo.json", 6)],
)
def test_a_budget_of_workers_is_a_fleet_with_room_for_them(device, profile, devices):
    replan = Replan(device=device, profile=profile)
    assert yaml.safe_load(fleet_line(6, replan, threads=2)) == {
        "nodes": [{"device": device, "devices": devices}]
    }


async def test_the_planner_is_the_plan_command_in_a_process_of_its_own(tmp_path):
    policy = parse_policy(POLICY + REPLAN % "apply")
    seen = Profiled((Shape(60, 8),) * 80, 80.0)
    config = Config.model_validate({"slo": {"ttft_s": 0.05, "tpot_s": 0.003}})
    planned = await PlannerProcess(config).plan(seen, policy)
    assert sum(planned.instances.values()) >= 1
    assert planned.reason
    strict = Config.model_validate({"slo": {"ttft_s": 1e-6, "tpot_s": 0.003}})
    with pytest.raises(PlannerFailed, match="ttft_s"):
        await PlannerProcess(strict).plan(seen, policy)
