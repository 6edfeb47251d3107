"""A policy in force on a real cluster: it grows, shrinks, and a bad one changes nothing."""

import pytest

from engine.errors import BadInput
from tests.ray.serving import serve
from tests.ray.streams import until

POLICY = """\
budget_accelerators: 4
metrics_interval_s: 0.2
look_back_period_s: 1
upscale_delay_s: 0
downscale_delay_s: 0
cooldown_s: 0
roles:
  decode: {{min_replicas: {least}, max_replicas: {most}}}
"""


def ready(client, role):
    return [i.id for i in client.status().instances if i.role == role and i.state == "ready"]


async def test_a_policy_grows_and_shrinks_the_fleet_and_a_bad_one_changes_nothing(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY.format(least=2, most=3))
    serving = serve(
        tmp_path / "serve.log", "--prefill", "1", "--decode", "1", "--policy", str(file)
    )
    try:
        with serving.client() as client:
            await until(lambda: len(ready(client, "decode")) >= 2)
            with pytest.raises(BadInput, match="below min_replicas"):
                client.apply_policy(POLICY.format(least=2, most=1))
            before = client.status().policy.version
            file.write_text(POLICY.format(least=2, most=2))
            await until(lambda: client.status().policy.version != before)
            changes = client.apply_policy(POLICY.format(least=1, most=1))
            assert "roles: changed" in changes
            await until(lambda: len(client.status().instances) == 2)
            await until(lambda: len(ready(client, "decode")) == 1)
            assert ready(client, "prefill") == ["prefill-0"]
            assert len(client.generate("Once upon a time", max_tokens=8).token_ids) == 8
    finally:
        assert serving.end() == 0
