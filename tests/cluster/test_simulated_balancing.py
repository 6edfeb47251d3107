"""`tandem simulate` lets the balancer do what it does in a cluster that serves the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.cli.planning import config_of, dynamics_of, read_plan_file
from cluster.config import MigrationConfig
from engine.errors import BadConfig

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
