"""What a profile makes of servers that were measured at work."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import BadConfig
from engine.messages import Role
from placement.latency.at_work import AtWork
from placement.latency.machine import Wait
from placement.latency.model import LatencyModel, Step, decode_step, prefill_step
from placement.latency.profile_file import profile_from

STEP_S, TOKEN_S, COLD_S = 0.0006, 0.0001, 0.001


class Passes(LatencyModel):
    pair_s = 0.0
    read_s = 1e-6

    def fixed_s(self, tokens: int, draws: int) -> float:
        return 0.002 + 1e-4 * tokens


def samples(times: float) -> dict[str, Any]:
    prompts = [
        {"tokens": n, "squares": n * n, "seconds": times * (0.002 + 1e-4 * n)}
        for n in (16, 64, 256, 1024)
    ]
    decodes = [
        {"batch": b, "context": c * b, "seconds": times * (0.002 + 1e-4 * b + 1e-6 * c * b)}
        for b in (1, 2, 8, 32)
        for c in (64, 1024)
    ]
    return {"prefill": prompts, "decode": decodes}


def document() -> dict[str, Any]:
    """Passes beside a neighbour take twice as long; in service decodes take 1.1 and prompts 1.2
    times as long, half as long again where KV is handed off, COLD_S more after a rest, and wait for
    processors."""
    beside = {"neighbours": 1, **samples(2.0)}
    return {
        "model": "demo",
        "device": "cpu-core",
        "runs": [{**samples(1.0), "beside": beside}],
        "at_work": [
            {"way_s": 0.004, "steps": [*at_work(1.0, 0.0, 0.1), *at_work(2.0, 1.0, 0.5)]},
            {
                "handed_off": True,
                "handoff_s": 0.003,
                "steps": [*at_work(1.5, 0.0, 0.2, 0.002), *at_work(3.0, 1.0, 0.7, 0.002)],
            },
        ],
        "speed": {"paces": [0.8, 1.2]},
    }


def at_work(times: float, others: float, waits: float, then_s: float = 0.0) -> list[dict[str, Any]]:
    found = []
    for step, longer in ((decode_step([100] * 4), 1.1), (prefill_step([(64, 0)]), 1.2)):
        for cold in (False, True):
            computed_s = times * longer * Passes().step_s(step) + COLD_S * cold
            between_s = STEP_S + TOKEN_S * step.draws + then_s
            found.append(
                {
                    **work(step),
                    "count": 5,
                    "others": others,
                    "cold": cold,
                    "processor_s": computed_s,
                    "waited_s": waits * computed_s,
                    "followed": 4,
                    "then_s": between_s,
                }
            )
    return found


def work(step: Step) -> dict[str, int]:
    return {name: value for name, value in step._asdict().items() if name != "mixed"}


def test_a_profile_knows_passes_beside_a_neighbour() -> None:
    profile = profile_from({**document(), "at_work": []})
    (run,) = profile.runs
    crowded = profile.crowded(1, 1)
    assert run.neighbours == 1
    assert crowded is not None
    assert crowded.decode_s([300] * 4) == pytest.approx(2 * 0.0036, rel=0.02)
    assert profile.crowded(2, 1) is None
    assert profile.arrival_s == 0.0
    assert profile.machine(1, 1) is None


def test_a_profile_knows_steps_at_work() -> None:
    profile = profile_from(document())
    latency, crowded = profile.in_service, profile.crowded(1, 1)
    assert latency.times == pytest.approx((1.2, 1.1, 0.0), rel=0.02)
    assert latency.between.step_s == pytest.approx(STEP_S / 1.1)
    assert latency.between.token_s == pytest.approx(TOKEN_S / 1.1)
    handing_off = profile.of_role(Role.DECODE).in_service
    assert handing_off.times == pytest.approx((1.8, 1.65, 0.0), rel=0.02)
    assert handing_off.between.step_s == pytest.approx((STEP_S + 0.002) / 1.2)
    assert isinstance(crowded, AtWork)
    assert crowded.between.step_s == pytest.approx(STEP_S / 1.5)
    assert crowded.times == pytest.approx((1.2, 1.1, 0.0), rel=0.02)
    assert profile.handoff_s == 0.003


def test_the_way_of_requests_is_the_median_of_servers_less_what_is_of_the_step() -> None:
    content = document()
    content["at_work"][1]["way_s"] = 0.006
    profile = profile_from(content)
    assert profile.way_s == pytest.approx(0.005)
    assert profile.arrival_s == pytest.approx(0.005 - (STEP_S + TOKEN_S) / 1.1, rel=0.02)
    content["at_work"][1]["way_steps"] = 1.5
    again = 0.5 * (STEP_S + TOKEN_S) / 1.1
    assert profile_from(content).arrival_s == pytest.approx(profile.arrival_s - again, rel=0.02)
    content["at_work"].append({"way_s": 0.5, "way_steps": 3.0, "steps": []})
    assert profile_from(content).way_s == pytest.approx(0.006)
    for server in content["at_work"]:
        server["way_s"] = 0.0
    assert profile_from(content).arrival_s == 0.0


def test_a_profile_knows_what_is_shared_of_a_machine() -> None:
    profile = profile_from(document())
    mixed, prefill = profile.machine(1, 1), profile.of_role(Role.PREFILL).machine(1, 1)
    assert mixed is not None
    assert prefill is not None
    assert mixed.waits.prompts == pytest.approx(Wait(0.1, 0.5))
    assert prefill.waits.decodes == pytest.approx(Wait(0.2, 0.7))
    assert mixed.cold_s == pytest.approx(COLD_S, rel=0.1)
    assert mixed.paces == (0.8, 1.2)
    wide = profile.machine(2, 2)
    assert wide is not None
    assert wide.width == 4


def test_a_profile_knows_what_other_processes_took() -> None:
    content = document()
    assert profile_from(content).other_cores == 0.0
    content["at_work"][1]["other_cores"] = 0.7
    assert profile_from(content).other_cores == 0.7


def test_where_no_pair_was_measured_it_waits_like_mixed_instances() -> None:
    one = document()
    one["at_work"] = one["at_work"][:1]
    decode = profile_from(one).of_role(Role.DECODE).machine(1, 1)
    assert decode is not None
    assert decode.waits.prompts == pytest.approx(Wait(0.1, 0.5))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"serving": [{"instances": 1}]}, "profile.serving"),
        ({"at_work": [{"way_s": 1}]}, "profile.at_work[0].steps"),
        ({"at_work": [{"way_s": -1, "steps": []}]}, "profile.at_work.way_s"),
        ({"at_work": [{"other_cores": "1", "steps": []}]}, "profile.at_work.other_cores"),
        ({"at_work": [{"steps": [{"count": 3}]}]}, "profile.at_work[0].steps[0].tokens"),
        ({"speed": {}}, "profile.speed.paces"),
        ({"speed": {"paces": [1.0, -1.0]}}, "profile.speed.paces"),
        ({"speed": {"paces": [float("inf")]}}, "profile.speed.paces"),
        ({"speeds": {}}, "profile"),
        ({"model": 5}, "profile.model"),
        ({"runs": [{**samples(1.0), "beside": {"prefill": []}}]}, "profile.runs[0].beside"),
        ({"runs": [{**samples(1.0), "beside": [1]}]}, "profile.runs[0].beside"),
        ({"runs": [{**samples(1.0), "beside": {"neighbors": 1}}]}, "profile.runs[0].beside"),
        ({"runs": [{**samples(1.0), "tensor_parallel": "2"}]}, "profile.runs[0].tensor_parallel"),
        ({"runs": [{**samples(1.0), "tensor_parallel": 0}]}, "profile.runs[0].tensor_parallel"),
        (
            {"runs": [{**samples(1.0), "pipeline_parallel": None}]},
            "profile.runs[0].pipeline_parallel",
        ),
        (
            {"runs": [{**samples(1.0), "kv_capacity_tokens": "x"}]},
            "profile.runs[0].kv_capacity_tokens",
        ),
        ({"transfer": [{"bytes": float("inf"), "seconds": 1.0}]}, "profile.transfer.bytes"),
    ],
)
def test_what_was_measured_badly_is_refused(changed: dict[str, Any], field: str) -> None:
    with pytest.raises(BadConfig) as refusal:
        profile_from({**document(), **changed})
    assert refusal.value.field == field
