"""Instances that are to lie side by side: their places, their placement groups, their ends."""

from dataclasses import replace

import pytest
import yaml

from cluster.config import load_config, parse_config
from cluster.control import placing
from cluster.control.placing import Groups, group_name, stage_bundles, wants_of
from cluster.control.pools import Ground, initial_specs, pool_spec
from cluster.roster import next_name
from engine.errors import BadConfig
from engine.messages import Role

GPUS = Ground("cuda", owned=False)
POOLS = {
    "units": 2,
    "prefill": {"instances": 2, "tensor_parallel": 2, "pipeline_parallel": 2},
    "decode": {"instances": 4, "pipeline_parallel": 2},
}


def config_of(**changed):
    return parse_config({"pools": {**POOLS, **changed}})


def specs_of(**changed):
    return {one.name: one for one in initial_specs(config_of(**changed), GPUS)}


def started(role, specs, **changed):
    """One more instance of the role, beside these."""
    name = next_name(role, specs)
    return pool_spec(config_of(**changed), GPUS, role, name, specs.values())


def test_every_unit_has_its_share_of_every_pool_and_room_for_all_their_workers_of_a_stage():
    specs = specs_of()
    members = {}
    for one in specs.values():
        members.setdefault(one.place.unit, []).append(one.name)
        assert stage_bundles(one) == [{"GPU": 4.0, "CPU": 4.0}] * 2
    assert members == {
        "unit-0": ["prefill-0", "decode-0", "decode-1"],
        "unit-1": ["prefill-1", "decode-2", "decode-3"],
    }
    assert len({(one.place.unit, one.place.number) for one in specs.values()}) == 6


def test_without_units_every_instance_stands_by_itself():
    for one in specs_of(units=None).values():
        assert one.place is None
        assert group_name(one) == f"tandem-{one.name}"
        assert stage_bundles(one) == [{"GPU": one.tensor_parallel, "CPU": one.tensor_parallel}] * 2


def test_what_has_left_a_unit_makes_room_there_for_the_next_of_its_shape():
    specs = specs_of()
    gone = specs.pop("decode-2")
    again = started(Role.DECODE, specs)
    assert (again.name, again.place) == ("decode-2", gone.place)
    assert started(Role.DECODE, {**specs, again.name: again}).place is None
    # Not for one of another shape, whatever its role.
    assert started(Role.PREFILL, specs).place is None


def test_roles_may_take_each_others_places_where_their_shapes_are_alike():
    alike = {"prefill": {"instances": 2, "pipeline_parallel": 2}}
    specs = specs_of(**alike)
    turned = replace(specs["decode-3"], role=Role.PREFILL)
    assert turned.place == specs["decode-3"].place
    gone = specs.pop("decode-0")
    assert started(Role.PREFILL, specs, **alike).place == gone.place


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"units": 3}, "pools.units"),
        ({"units": 4}, "pools.units"),
        ({"units": 0}, "pools.units"),
        ({"decode": {"instances": 4}}, "pools.units"),
        ({"decode": {"instances": 4, "pipeline_parallel": 2, "resources": {"CPU": 0}}}, "pools"),
    ],
)
def test_units_that_cannot_be_are_refused(changed, field):
    with pytest.raises(BadConfig) as refusal:
        config_of(**changed)
    assert refusal.value.field == field


def test_a_plan_deploys_its_units(tmp_path):
    plan = {
        "slo": {"ttft_s": 1.0, "tpot_s": 0.1},
        "pools": [{"role": "prefill", "instances": 2}, {"role": "decode", "instances": 4}],
        "co_located": {"units": 2, "crossing_token_s": 0.0002},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    config = load_config(str(path))
    assert config.pools.units == 2
    assert config.gateway.routing.crossing_token_s == 0.0002
    assert {one.place.unit for one in initial_specs(config, GPUS)} == {"unit-0", "unit-1"}
    path.write_text(yaml.safe_dump({**plan, "gateway": []}))
    with pytest.raises(BadConfig, match="gateway"):
        load_config(str(path))


@pytest.fixture
def ray_groups(monkeypatch):
    """Ray's placement groups by name; one that stands must not be made again."""
    standing = {}

    def make(bundles, *, strategy, name, lifetime):
        assert name not in standing
        assert lifetime == "detached"
        assert strategy == ("STRICT_PACK" if len(bundles) == 1 else "PACK")
        standing[name] = group = object()
        return group

    def remove(group):
        (name,) = (name for name, one in standing.items() if one is group)
        del standing[name]

    monkeypatch.setattr(placing, "placement_group", make)
    monkeypatch.setattr(placing, "remove_placement_group", remove)
    monkeypatch.setattr(placing, "get_placement_group", standing.__getitem__)
    return standing


def test_a_units_instances_share_a_group_that_outlives_each_of_them(ray_groups):
    groups, specs = Groups(), specs_of()
    prefill, first, second = (specs[name] for name in ("prefill-0", "decode-0", "decode-1"))
    held = {groups.hold(one) for one in (prefill, first, second)}
    assert len(held) == 1
    assert list(ray_groups) == ["tandem-unit-0"]
    groups.hold(specs["decode-2"])
    assert sorted(ray_groups) == ["tandem-unit-0", "tandem-unit-1"]
    groups.release(first)
    groups.release(first)
    assert {groups.hold(first)} == held
    for one in (prefill, first, second):
        assert "tandem-unit-0" in ray_groups
        groups.release(one)
    groups.release(specs["decode-2"])
    assert ray_groups == {}


def test_a_new_controller_takes_a_units_group_over_with_whom_it_finds_there(ray_groups):
    specs = specs_of()
    before, after = Groups(), Groups()
    held = before.hold(specs["decode-0"])
    assert after.adopt(specs["decode-0"]) is held
    assert after.hold(specs["prefill-0"]) is held
    after.release(specs["decode-0"])
    assert ray_groups == {"tandem-unit-0": held}
    after.release(specs["prefill-0"])
    assert ray_groups == {}


def test_who_waits_for_a_unit_to_find_its_place_is_told_which_and_what_it_wants():
    wanted = "CPU=4, GPU=4 on one node for each stage of unit-1"
    assert wants_of(specs_of()["decode-2"]) == wanted
    assert wants_of(specs_of(units=None)["decode-2"]) == "CPU=1, GPU=1"
