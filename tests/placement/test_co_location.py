"""Plans whose pools lie side by side: where the network is slow, KV is to stay within nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml

from engine.errors import BadConfig
from engine.messages import Role
from placement.latency.catalog import Hardware, find_link, find_model, one_kind
from placement.planning.candidate import Candidate, deployment_for, deployment_of
from placement.planning.co_location import CoLocation
from placement.planning.costbook import CostBook, Cut
from placement.planning.optimizer import plan
from placement.planning.packing import holds
from placement.planning.phases import feasible_cuts, phase_of
from placement.planning.plan import Plan, PoolPlan, Target, plan_from
from placement.planning.question import Question
from placement.planning.search import Search
from placement.routing.router import RouterSettings
from placement.simulation.deployment import Deployment, Overheads
from placement.simulation.simulator import Simulation
from placement.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET = Target(1.2, 0.03)
DEVICE = "a100-80gb"


def book(nodes: int = 2, devices: int = 3, network: str = "ethernet-25") -> CostBook:
    groups = one_kind(DEVICE, nodes, devices).groups
    return CostBook(find_model("opt-13b"), Hardware(groups, find_link(network)))


def documents(count: int = 120) -> Workload:
    generator = np.random.default_rng(5)
    return Workload(
        np.cumsum(generator.exponential(1.0, count)),
        generator.integers(1000, 3000, count),
        generator.integers(100, 200, count),
    )


@pytest.fixture(scope="module")
def found() -> Plan:
    question = Question(TARGET, requests=80, most_requests=80, token_budgets=(2048,))
    return plan(book(), documents(), question)


def test_over_a_slow_network_prefill_is_planned_beside_what_decodes(found: Plan) -> None:
    assert [pool.role.decodes for pool in found.pools] == [False, True]
    assert found.co_located is not None
    assert found.co_located.units == 2
    assert found.co_located.crossing_token_s > 1e-4
    assert "side by side in 2 units" in found.reason
    assert "KV stays within nodes: over ethernet-25" in found.reason


def test_the_plan_says_so_and_is_read_back(found: Plan) -> None:
    written = yaml.safe_load(found.to_yaml())
    assert written["co_located"]["units"] == 2
    again = plan_from(written)
    assert again.co_located is not None
    assert again.co_located.units == 2
    assert again.pools == found.pools
    assert again.to_yaml().split("predicted:")[0] == found.to_yaml().split("predicted:")[0]


class Watching(Simulation):
    """Counts the hand-offs that stay on a node and those that leave it."""

    def __init__(self, deployment: Deployment, load: Workload) -> None:
        super().__init__(deployment, load)
        self.stayed = self.left = 0
        choose = self._router.choose

        def counted(*arguments: object) -> object:
            route = choose(*arguments)  # type: ignore[arg-type]
            if route is not None and route.decode is not None:
                nodes = {self.instances[n].model.node for n in (route.prefill, route.decode)}
                self.stayed += len(nodes) == 1
                self.left += len(nodes) == 2
            return route

        self._router.choose = counted  # type: ignore[method-assign, assignment]


def test_all_units_under_one_router_do_what_one_was_predicted_to(found: Plan) -> None:
    deployment = deployment_for(found, book())
    assert len({one.node for one in deployment.instances}) == 2
    load = documents().at_rate(found.predicted["goodput_rps"])
    near, far = (
        Watching(deployment, load),
        Watching(replace(deployment, router=RouterSettings()), load),
    )
    attained = near.run().figures()["attainment"]
    far.run()
    assert attained >= TARGET.attainment - 0.05
    assert near.left < near.stayed / 4
    assert far.left > near.left


def test_each_unit_has_its_share_of_every_pool_on_its_own_node() -> None:
    cut = Cut(DEVICE)
    pools = (PoolPlan(Role.PREFILL, 2, cut), PoolPlan(Role.DECODE, 4, cut))
    candidate = Candidate(pools, 2048, units=2)
    nodes = [one.node for one in deployment_of(book(), candidate, TARGET, Overheads()).instances]
    assert nodes == ["unit-0", "unit-1", "unit-0", "unit-0", "unit-1", "unit-1"]
    apart = deployment_of(book(), replace(candidate, units=None), TARGET, Overheads())
    assert len({one.node for one in apart.instances}) == 6


def search(costs: CostBook) -> Search:
    phases = [
        phase_of(costs, cut, documents(), TARGET) for cut in feasible_cuts(costs, documents())
    ]
    return Search(costs, phases, TARGET, (2048,), lambda *_: True)


def units_of(instances: int, cut: Cut) -> Candidate:
    pools = (PoolPlan(Role.PREFILL, 1, cut), PoolPlan(Role.DECODE, instances - 1, cut))
    return Candidate(pools, 2048, units=1)


@pytest.mark.parametrize(
    ("nodes", "devices", "instances", "cut", "copies"),
    [
        (4, 8, 2, Cut(DEVICE, 2), 8),
        (4, 8, 3, Cut(DEVICE, 2), 4),
        (4, 8, 5, Cut(DEVICE, 2), 0),
        (4, 8, 2, Cut(DEVICE, 4, 2), 2),
        (4, 8, 3, Cut(DEVICE, 1, 2), 4),
        (3, 8, 2, Cut(DEVICE, 4, 2), 1),
    ],
)
def test_as_many_units_are_counted_as_there_are_nodes_with_room_for_them(
    nodes: int, devices: int, instances: int, cut: Cut, copies: int
) -> None:
    assert search(book(nodes, devices)).copies(units_of(instances, cut)) == copies


def together(prospects: Search) -> Iterator[Candidate]:
    return (one.candidate for one in prospects.prospects() if one.candidate.units is not None)


def test_only_cuts_of_the_same_depth_and_device_lie_side_by_side() -> None:
    candidates = list(together(search(book(4, 8))))
    assert candidates
    for one in candidates:
        assert len({(pool.cut.device, pool.cut.pipeline) for pool in one.pools}) == 1


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (2, "co_located"),
        ({}, "co_located.units"),
        ({"units": 0}, "co_located.units"),
        ({"units": 4}, "co_located.units"),
        ({"unit": 2}, "co_located"),
        ({"units": 2, "crossing_token_s": -1}, "co_located.crossing_token_s"),
        ({"units": 2, "crossing_token_s": True}, "co_located.crossing_token_s"),
        ({"units": 2, "crossing_token_s": float("inf")}, "co_located.crossing_token_s"),
    ],
)
def test_what_makes_no_units_is_refused(said: object, field: str) -> None:
    pools = [{"role": "prefill", "instances": 2}, {"role": "decode", "instances": 2}]
    assert plan_from({"pools": pools, "co_located": {"units": 2}}).co_located == CoLocation(2)
    with pytest.raises(BadConfig) as refusal:
        plan_from({"pools": pools, "co_located": said})
    assert refusal.value.field == field


def test_pools_of_different_depths_are_not_said_to_lie_side_by_side() -> None:
    pools = [{"role": "prefill"}, {"role": "decode", "pipeline_parallel": 2}]
    with pytest.raises(BadConfig, match="pipeline_parallel"):
        plan_from({"pools": pools, "co_located": {"units": 1}})


def test_nor_are_pools_on_different_devices() -> None:
    pools = [{"role": "prefill", "device": "l4"}, {"role": "decode", "device": "a10g"}]
    with pytest.raises(BadConfig, match="one kind of device"):
        plan_from({"pools": pools, "co_located": {"units": 1}})


def test_a_plans_units_need_nodes_that_hold_them_whole() -> None:
    """A unit of three accelerators leaves one of four idle, where two of them need all six."""
    pools = (PoolPlan(Role.PREFILL, 2, Cut(DEVICE, 1)), PoolPlan(Role.DECODE, 2, Cut(DEVICE, 2)))
    apart = Plan("opt-13b", TARGET, pools)
    together = replace(apart, co_located=CoLocation(2))
    for nodes, devices, fits in ((2, 3, True), (2, 4, True), (3, 2, False), (1, 6, True)):
        hardware = book(nodes, devices).hardware
        assert holds(hardware, apart)
        assert holds(hardware, together) == fits
