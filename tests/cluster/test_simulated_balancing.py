"""`tandem simulate` lets the balancer do what it does in a cluster that serves the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cluster.cli.planning import (
    as_configured,
    config_of,
    cost_book,
    dynamics_of,
    read_plan_file,
)
from cluster.config import MigrationConfig
from engine.errors import BadConfig
from placement.planning.candidate import deployment_for
from placement.planning.optimizer import answer
from placement.planning.plan import Target
from placement.planning.question import AS_A_CLUSTER, Question
from placement.simulation.simulator import Simulation
from placement.workload import Workload

if TYPE_CHECKING:
    from pathlib import Path


def plan(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(f"model: demo\n{text}")
    return path


def test_the_balancer_works_as_a_cluster_has_it_by_default(tmp_path: Path) -> None:
    dynamics, served = dynamics_of(config_of(plan(tmp_path, ""))), MigrationConfig()
    assert dynamics.balance is served.enabled is True
    assert (dynamics.look_s, dynamics.balancer) == (served.interval_s, served.balancer)
    assert dynamics.policy is None


def test_a_plan_that_sets_migration_is_simulated_as_it_will_be_served(tmp_path: Path) -> None:
    pools = "pools: [{role: mixed, instances: 2, device: cpu-core}]\n"
    path = plan(tmp_path, f"{pools}migration: {{enabled: false, interval_s: 3}}\n")
    assert read_plan_file(path).accelerators == 2
    dynamics = dynamics_of(config_of(path))
    assert (dynamics.balance, dynamics.look_s) == (False, 3.0)


def test_a_migration_that_no_cluster_would_accept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig) as refusal:
        config_of(plan(tmp_path, "migration: {intervall_s: 3}\n"))
    assert refusal.value.field == "migration.intervall_s"


def test_the_search_for_a_plan_supposes_the_same_balancer(tmp_path: Path) -> None:
    assert dynamics_of(config_of(plan(tmp_path, ""))) == AS_A_CLUSTER


def test_what_a_plan_predicts_is_what_simulating_it_says(tmp_path: Path) -> None:
    """Of the same requests; among them long ones, so that the balancer has something to do."""
    nodes = [{"device": "a100-40gb", "count": 2, "devices": 1}]
    fleet = {"nodes": nodes, "network": "shared-memory"}
    book = cost_book("opt-13b", fleet)
    asked = Question(Target(8.0, 0.3), requests=300, most_requests=300, token_budgets=(2048,))
    found = answer(book, long_answers(), asked)
    path = tmp_path / "plan.yaml"
    path.write_text(replace(found.plan, hardware=fleet).to_yaml())
    scored = found.chosen.scored
    assert (found.chosen.copies, scored.goodput.outcome is None) == (1, False)
    seen = len(scored.goodput.outcome.arrived_s)
    load = found.setting.sample.first(seen).at_rate(scored.goodput.rate_rps)
    config = config_of(path)
    deployment = as_configured(deployment_for(read_plan_file(path), book), config)
    simulation = Simulation(deployment, load, dynamics=dynamics_of(config))
    said = {**simulation.run().figures(), "goodput_rps": found.plan.predicted["goodput_rps"]}
    assert simulation.record.migrations > 0
    assert said == {name: found.plan.predicted[name] for name in said}


def long_answers(count: int = 300) -> Workload:
    generator = np.random.default_rng(5)
    return Workload(
        np.cumsum(generator.exponential(1.0, count)),
        np.clip(generator.lognormal(5.5, 1.0, count), 8, 4000).astype(int),
        np.clip(generator.lognormal(5.5, 1.0, count), 2, 3000).astype(int),
    )
