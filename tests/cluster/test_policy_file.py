from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from cluster.policy_file import parse_policy, policy_schema
from engine.errors import BadConfig
from engine.messages import Role
from placement.scaling.policy import PredictorName, SignalName

GOOD = """\
name: test
budget_accelerators: 8
roles:
  prefill:
    min_replicas: 1
    max_replicas: 4
    signals:
      - signal: ttft_attainment
        target: 0.9
  decode:
    min_replicas: 2
    max_replicas: 5
"""


def refused(text, line, match):
    with pytest.raises(BadConfig, match=match) as caught:
        parse_policy(text)
    assert caught.value.field.startswith(f"line {line}"), caught.value
    assert "\n" not in str(caught.value)


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def test_a_policy_sets_what_it_names_and_leaves_the_rest_at_its_defaults():
    policy = parse_policy(GOOD)
    assert [role for role, _ in policy.roles.named] == [Role.PREFILL, Role.DECODE]
    assert policy.roles.prefill.signals[0].signal is SignalName.TTFT_ATTAINMENT
    assert policy.forecast.predictor is PredictorName.CONSTANT
    assert not policy.dry_run


def test_what_ray_serve_has_too_is_called_as_there():
    schema = policy_schema()
    ours = set(schema["properties"]) | set(schema["$defs"]["RolePolicy"]["properties"])
    shared = {
        "min_replicas",
        "max_replicas",
        "target_ongoing_requests",
        "metrics_interval_s",
        "look_back_period_s",
        "upscale_delay_s",
        "downscale_delay_s",
        "downscale_to_zero_delay_s",
    }
    assert shared <= ours


@pytest.mark.parametrize(
    ("text", "line", "match"),
    [
        (changed("name: test", "nam: test"), 1, "did you mean 'name'"),
        (changed("max_replicas", "max_replica"), 6, "did you mean 'max_replicas'"),
        (changed("  target: 0.9", "  targets: 0.9"), 9, "did you mean 'target'"),
        (changed("  decode:", "  decod:"), 10, "did you mean 'decode'"),
        (changed("min_replicas: 2", "min_instances: 2"), 11, "one of .*min_replicas"),
    ],
)
def test_an_unknown_field_is_refused_with_its_line_and_the_nearest_name(text, line, match):
    refused(text, line, match)


@pytest.mark.parametrize(
    ("text", "line", "match"),
    [
        (changed("max_replicas: 4", "max_replicas: 0"), 6, "below min_replicas, which is 1"),
        (changed("ttft_attainment", "ttft"), 8, "roles.prefill.signals.0..signal: 'ttft'"),
        (changed("ttft_attainment", "kv_use"), 4, "kv_use does not apply to prefill"),
        (changed("target: 0.9", "target: 0"), 9, "greater than 0"),
        (changed("target: 0.9", "target: .nan"), 9, "finite"),
        (changed("budget_accelerators: 8", "budget_accelerators: 2"), 3, "add up to 3"),
        (changed("budget_accelerators: 8", ""), 1, "budget_accelerators: .*required"),
        (changed("name: test", "downscale_delay_s: 1"), 1, "below upscale_delay_s"),
        (changed("name: test", "look_back_period_s: 1"), 1, "below metrics_interval_s"),
        (changed("name: test", "downscale_to_zero_delay_s: 1"), 1, "below downscale_delay_s"),
        (changed("name: test", "forecast: {predictor: holt_winters}"), 1, "length of a season"),
        (changed("name: test", "forecast: {predictor: arima}"), 1, "predictor: 'arima'"),
        (changed("name: test", "metrics_interval_s: soon"), 1, "valid number"),
        (GOOD.partition("roles:")[0] + "roles: {}\n", 3, "must name prefill, decode or mixed"),
        ("name: a\nname: b\n", 2, "given twice"),
        ("name: [a\n", 2, "not YAML"),
        ("a: &x [1]\nb: *x\n", 2, "no aliases"),
        ("a: " + "[" * 40 + "]" * 40, 1, "nested deeper"),
    ],
)
def test_a_bad_value_is_refused_with_its_line_and_the_rule(text, line, match):
    refused(text, line, match)


SCHEDULE = (
    GOOD
    + """\
    schedules:
      - cron: "0 8 * * mon-fri"
        duration_s: 3600
        timezone: Europe/Berlin
        min_replicas: 4
"""
)


@pytest.mark.parametrize(
    ("old", "new", "line", "match"),
    [
        ('"0 8 * * mon-fri"', '"0 25 * * *"', 14, "not a cron expression"),
        ('"0 8 * * mon-fri"', '"0 8 * *"', 14, "five fields"),
        ('"0 8 * * mon-fri"', '"0 0 30 2 *"', 14, "not a cron expression"),
        ("Europe/Berlin", "Mars/Base", 16, "no such time zone"),
        ("min_replicas: 4", "min_replicas: 6", 13, "above the role's max_replicas 5"),
    ],
)
def test_a_bad_schedule_is_refused_with_its_line(old, new, line, match):
    head, tail = SCHEDULE.rsplit(old, 1)
    refused(head + new + tail, line, match)


def test_a_schedule_sets_the_limits_while_it_is_open_in_its_own_time_zone():
    decode = parse_policy(SCHEDULE).roles.decode
    eight_s = datetime(2024, 1, 8, 7, tzinfo=UTC).timestamp()  # in Berlin, in winter
    assert decode.limits(eight_s - 1.0) == (2, 5)
    assert decode.limits(eight_s) == (4, 5)
    assert decode.limits(eight_s + 3599.0) == (4, 5)
    assert decode.limits(eight_s + 3600.0) == (2, 5)


def test_the_schema_describes_every_field():
    schema = policy_schema()
    assert schema["properties"]["upscale_delay_s"]["description"]
    assert "min_replicas" in schema["$defs"]["RolePolicy"]["properties"]


def test_the_page_on_policies_names_every_field_signal_and_predictor():
    page = Path("docs/autoscaling.md").read_text()
    schema = policy_schema()
    sections = [schema, *schema["$defs"].values()]
    names = [
        name for one in sections for name in (*one.get("properties", ()), *one.get("enum", ()))
    ]
    assert len(names) > 50
    assert [name for name in names if name not in page] == []


EXAMPLES = sorted(Path("cluster/configs/policies").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_shipped_policy_is_valid_and_explained(path):
    text = path.read_text()
    assert text.startswith("# ")
    policy = parse_policy(text)
    assert policy.name == yaml.safe_load(text)["name"]


def test_there_are_six_examples():
    assert len(EXAMPLES) == 6
