"""The roofline's shape, the catalog's data and the fit to a profile."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from engine.errors import BadCheckpoint, BadConfig, Unsupported
from placement.latency.catalog import (
    device_names,
    entry_of,
    find_device,
    find_link,
    find_model,
    hardware_from,
    model_names,
    one_kind,
    read_hardware,
)
from placement.latency.measured import fit_link
from placement.latency.model import Step, decode_step, mixed_step, prefill_step
from placement.latency.model_shape import shape_from_config
from placement.latency.profile_file import profile_from, read_profile
from placement.latency.robust_fit import fit_costs, nonnegative_least_squares
from placement.latency.roofline import Roofline, power_w

if TYPE_CHECKING:
    from pathlib import Path


def roofline(
    model: str = "llama-2-70b", device: str = "h100-80gb", tensor: int = 4, pipeline: int = 1
) -> Roofline:
    known = find_device(device)
    return Roofline(find_model(model), known, find_link(known.link), tensor, pipeline)


PUBLISHED_BILLIONS = {
    "opt-13b": 13, "opt-66b": 66, "opt-175b": 175, "bloom-176b": 176, "llama-2-7b": 6.74,
    "llama-2-13b": 13.0, "llama-2-70b": 69.0, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6,
    "qwen3-8b": 8.19, "qwen3-30b-a3b": 30.5, "mixtral-8x7b": 46.7,
}  # fmt: skip


@pytest.mark.parametrize("name", model_names())
def test_catalog_models_have_the_parameters_they_are_known_for(name: str) -> None:
    assert find_model(name).parameters / 1e9 == pytest.approx(PUBLISHED_BILLIONS[name], rel=0.03)


@pytest.mark.parametrize("name", device_names())
def test_every_device_has_a_link_and_a_source(name: str) -> None:
    device = find_device(name)
    assert find_link(device.link).bytes_per_s > 0
    assert device.source
    assert 0 < device.idle_w < device.power_w


def test_kv_of_grouped_queries_is_a_share_of_all_heads() -> None:
    assert find_model("llama-2-70b").kv_bytes_per_token == 80 * 2 * 8 * 128 * 2
    assert find_model("opt-66b").kv_bytes_per_token == 64 * 2 * 9216 * 2


def test_config_names_of_other_families_are_understood() -> None:
    falcon = {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32,
              "num_attention_heads": 71, "multi_query": True, "vocab_size": 65024}  # fmt: skip
    shape = shape_from_config("falcon-7b", falcon)
    assert (shape.kv_heads, shape.gated, shape.intermediate) == (1, False, 4 * 4544)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden_size": None}, BadCheckpoint),
        ({"hidden_size": "wide"}, BadCheckpoint),
        ({"num_hidden_layers": 0}, BadCheckpoint),
        ({"torch_dtype": "int3"}, BadConfig),
        ({"kv_lora_rank": 512}, Unsupported),
        ({"shared_expert_intermediate_size": 64}, Unsupported),
        ({"n_shared_experts": 2}, Unsupported),
        ({"quantization_config": {"quant_method": "awq"}}, BadCheckpoint),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack"}},
            BadCheckpoint,
        ),
    ],
)
def test_a_config_without_a_cost_model_is_refused(
    change: dict[str, object], error: type[Exception]
) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "vocab_size": 100}  # fmt: skip
    with pytest.raises(error):
        shape_from_config("odd", config | change)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(BadConfig, match="did you mean 'h100-80gb'"):
        find_device("h100-80g")
    with pytest.raises(BadConfig, match="did you mean 'opt-66b'"):
        find_model("facebook/opt-66")


def test_steps_sum_what_their_duration_depends_on() -> None:
    assert prefill_step([(100, 0), (10, 50)]) == Step(110, 2, 5050 + 555, 50)
    assert decode_step([10, 20]) == Step(2, 2, 0, 30)
    assert mixed_step([(4, 0)], [7]) == Step(5, 2, 10, 7, mixed=True)


def test_more_of_anything_takes_longer() -> None:
    model = roofline()
    base = Step(256, 8, 1000, 5000)
    for more in ({"tokens": 512}, {"draws": 16}, {"pairs": 9000}, {"kv_read_tokens": 99_000}):
        assert model.step_s(base._replace(**more)) > model.step_s(base)


def test_decode_is_bound_by_memory_and_prefill_by_arithmetic() -> None:
    model, device = roofline(tensor=8), find_device("h100-80gb")
    weights_s = model.weight_bytes_read(1) / device.memory_bytes_per_s
    assert weights_s < model.decode_s([100]) < 3 * weights_s
    compute_s = model.flops(8192, 1) / device.bf16_flops
    assert compute_s < model.prefill_s([(8192, 0)]) < 3 * compute_s


def test_a_run_of_decode_steps_is_the_sum_of_its_steps() -> None:
    model = roofline()
    contexts = [100, 200, 300]
    walked = sum(model.decode_s([c + i for c in contexts]) for i in range(50))
    assert model.decode_run_s(3, 600, 50) == pytest.approx(walked)


def test_tensor_parallelism_speeds_up_less_than_its_size() -> None:
    times = [roofline(tensor=n).prefill_s([(2048, 0)]) for n in (2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[2] < 4


def test_a_pipeline_finishes_more_often_but_no_sooner() -> None:
    step = prefill_step([(2048, 0)])
    one, four = roofline(pipeline=1), roofline(pipeline=4)
    assert four.step_s(step) >= one.step_s(step)
    assert four.stage_s(step) < one.stage_s(step) / 3


def test_experts_are_read_as_they_are_touched() -> None:
    sparse = roofline("mixtral-8x7b", tensor=1)
    assert sparse.experts_touched(1) == pytest.approx(2)
    assert sparse.experts_touched(1000) == pytest.approx(8)
    assert sparse.decode_s([10] * 32) > 1.5 * sparse.decode_s([10])


def test_fp8_weights_halve_what_decode_reads() -> None:
    model = roofline(tensor=8)
    small = replace(model, shape=replace(model.shape, dtype="float8_e4m3fn"))
    assert small.decode_s([1]) < 0.75 * model.decode_s([1])
    assert small.prefill_s([(8192, 0)]) < 0.75 * model.prefill_s([(8192, 0)])


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "vocab_size": 128256, "torch_dtype": "bfloat16"}  # fmt: skip


def test_matrices_stored_in_8_bits_are_read_so_and_computed_with_as_before() -> None:
    wide = roofline("llama-3.1-8b", tensor=1)
    shape = shape_from_config("llama-3.1-8b", LLAMA | {"quantization_config": FP8})
    narrow = replace(wide, shape=shape)
    embeddings = 2 * 4096 * 128256
    assert shape.parameters == wide.shape.parameters
    assert shape.weight_bytes == shape.parameters + embeddings
    assert shape.kv_bytes_per_token == wide.shape.kv_bytes_per_token
    assert narrow.weight_bytes_read(1) < 0.57 * wide.weight_bytes_read(1)
    assert narrow.decode_s([1]) < 0.75 * wide.decode_s([1])
    assert narrow.prefill_s([(8192, 0)]) > 0.97 * wide.prefill_s([(8192, 0)])


QWEN3_MOE = {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
             "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
             "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
             "head_dim": 128, "vocab_size": 151936}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "dense"),
    [
        ({}, 0),
        ({"mlp_only_layers": [0, 1, 5]}, 3),
        ({"decoder_sparse_step": 2}, 24),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [0, 1]}, 25),
        ({"first_k_dense_replace": 4}, 4),
    ],
)
def test_layers_without_experts_are_counted_as_they_are(said: dict[str, Any], dense: int) -> None:
    known, shape = find_model("qwen3-30b-a3b"), shape_from_config("moe", QWEN3_MOE | said)
    less = dense * (128 * (3 * 2048 * 768 + 2048) - 3 * 2048 * 6144)
    assert known.parameters - shape.parameters == less
    assert shape.weight_bytes == 2 * shape.parameters
    device = find_device("h100-80gb")
    model = Roofline(shape, device, find_link(device.link))
    every = replace(model, shape=known)
    assert (model.decode_s([10] * 64) < every.decode_s([10] * 64)) == (dense > 0)
    assert (model.flops(1, 1) == every.flops(1, 1)) == (dense == 0)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(BadConfig, match="heads or the MLP do not divide"):
        roofline("opt-66b", tensor=5)


def test_a_power_cap_slows_prompts_and_spares_tokens() -> None:
    model = roofline("bloom-176b", tensor=8)
    capped = replace(model, device=model.device.capped(350))
    slower = capped.prefill_s([(4096, 0)]) / model.prefill_s([(4096, 0)])
    assert 1.2 < slower < 1.4
    assert capped.decode_s([500] * 8) < 1.03 * model.decode_s([500] * 8)
    with pytest.raises(BadConfig, match="idles"):
        model.device.capped(10)


def test_power_grows_with_use_up_to_the_limit() -> None:
    device = find_device("h100-80gb")
    watts = [power_w(device, share, share) for share in (0.0, 0.3, 0.6, 1.0)]
    assert watts == sorted(watts)
    assert (watts[0], watts[-1]) == (device.idle_w, device.power_w)


def test_a_fleet_file(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        "network: infiniband-hdr\nnodes:\n- {device: h100-80gb, count: 2, power_cap_w: 400}\n"
        "- {device: a100-80gb, count: 1, devices: 4, price_per_hour: 1.5}\n"
    )
    fleet = read_hardware(path)
    assert fleet.devices == 20
    assert fleet.group("h100-80gb").device.power_w == 400
    assert fleet.group("a100-80gb").device.price_per_hour == 1.5
    assert fleet.network.name == "infiniband-hdr"
    assert one_kind("l4", 2).devices == 16


CAPPED = "{device: h100-80gb, power_cap_w: 350}"


@pytest.mark.parametrize(
    ("nodes", "kinds"),
    [
        (["{device: h100-80gb}", CAPPED], {"h100-80gb": (1, 700), "h100-80gb@350W": (1, 350)}),
        ([CAPPED], {"h100-80gb": (1, 350)}),
        ([CAPPED, CAPPED], {"h100-80gb": (2, 350)}),
        (
            ["{device: l4}", "{device: l4, devices: 4, count: 3}"],
            {"l4": (1, 72), "l4/devices=4": (3, 72)},
        ),
        (["{device: l4}", "{device: l4, devices: 8, count: 3}"], {"l4": (4, 72)}),
        (
            ["{device: l4, price_per_hour: 0.5}", "{device: l4, link: pcie5}"],
            {"l4/price=0.5": (1, 72), "l4/link=pcie5": (1, 72)},
        ),
    ],
)
def test_one_device_in_nodes_that_differ_is_several_kinds(
    nodes: list[str], kinds: dict[str, tuple[int, float]]
) -> None:
    fleet = hardware_from(yaml.safe_load(f"nodes: [{', '.join(nodes)}]"))
    assert {one.device.name: (one.nodes, one.device.power_w) for one in fleet.groups} == kinds
    entries = [entry_of(group) for group in fleet.groups]
    again = hardware_from({"nodes": entries, "network": fleet.network.name})
    assert again == fleet


def test_a_fleet_has_one_group_of_each_kind() -> None:
    fleet = one_kind("l4")
    with pytest.raises(BadConfig, match="must be one entry"):
        replace(fleet, groups=fleet.groups * 2)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("nodes: []", "hardware.nodes"),
        ("nodes: [{device: l4, price_per_hour: .inf}]", "hardware.nodes[0].price_per_hour"),
        ("nodes: [{device: l4, power_cap_w: .nan}]", "hardware.nodes[0].power_cap_w"),
        ("nodes: [{device: tpu}]", "device"),
        ("nodes: [{device: l4, count: 0}]", "hardware.nodes[0].count"),
        ("nodes: [{device: l4, cuont: 1}]", "hardware.nodes[0]"),
        ("nodes: [{device: l4}]\nnetwork: string", "link"),
        ("- l4", None),
    ],
)
def test_a_bad_fleet_file_is_refused(tmp_path: Path, text: str, field: str | None) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(BadConfig) as refusal:
        read_hardware(path)
    assert refusal.value.field == (field or str(path))


def test_nonnegative_least_squares_binds_what_would_be_negative() -> None:
    features = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(
        nonnegative_least_squares(features, np.array([2.0, -1.0, 1.0])), [1.5, 0.0], atol=1e-9
    )


def test_the_fit_shrugs_off_outliers() -> None:
    generator = np.random.default_rng(3)
    features = np.column_stack([np.ones(200), generator.uniform(1, 1000, 200)])
    seconds = features @ np.array([0.01, 0.0002])
    seconds[::20] *= 5
    np.testing.assert_allclose(fit_costs(features, seconds).coefficients, [0.01, 2e-4], rtol=0.02)


def measured_profile() -> dict[str, Any]:
    """Samples of a machine whose costs are known exactly."""
    prefill = [
        {"tokens": n, "squares": n * n, "seconds": 0.002 + 1e-4 * n + 1e-8 * (n * n + n) / 2}
        for n in (16, 64, 256, 512, 1024, 2048)
    ]
    decode = [
        {"batch": b, "context": c * b, "seconds": 0.002 + 1e-4 * b + 2e-7 * c * b}
        for b in (1, 2, 4, 8, 32)
        for c in (128, 1024)
    ]
    run = {"tensor_parallel": 1, "prefill": prefill, "decode": decode, "kv_capacity_tokens": 9000}
    transfer = [{"bytes": n, "seconds": 1e-5 + n / 3e9} for n in (1e4, 1e6, 1e8)]
    return {"model": "demo", "device": "cpu-core", "runs": [run], "transfer": transfer}


def test_a_profile_is_reproduced_and_extrapolation_is_flagged(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(measured_profile()))
    profile = read_profile(path)
    latency, report = profile.latency(roofline("llama-2-7b", "cpu-core", 1), 1, 1)
    assert report.p90_error < 0.01
    assert latency.decode_s([512] * 16) == pytest.approx(0.002 + 16e-4 + 2e-7 * 8192, rel=0.05)
    assert latency.prefill_s([(700, 0)]) == pytest.approx(0.002 + 0.07 + 0.00245, rel=0.05)
    assert latency.outside(2048, 100) == ()
    assert "measured up to 2048" in latency.outside(4000, 100)[0]


def test_what_prompts_take_and_what_they_take_beside_decodes_are_told_apart() -> None:
    content = measured_profile()
    run = content["runs"][0]
    for entry in run["prefill"]:
        entry["seconds"] += 0.001
    run["mixed"] = [
        {
            "tokens": n,
            "squares": n * n,
            "batch": b,
            "context": 256 * b,
            "seconds": 0.006 + 1e-4 * (n + b) + 1e-8 * (n * n + n) / 2 + 2e-7 * 256 * b,
        }
        for n in (64, 256)
        for b in (4, 16)
    ]
    latency, report = profile_from(content).latency(roofline("llama-2-7b", "cpu-core", 1), 1, 1)
    assert report.p90_error < 0.02
    assert latency.mixed_s == pytest.approx(0.003, rel=0.1)
    mixed = latency.step_s(mixed_step([(20, 0)], [256] * 4))
    assert mixed == pytest.approx(0.006 + 24e-4 + 2e-7 * 1024, rel=0.05)
    two, _ = profile_from(content).latency(roofline("llama-2-7b", "cpu-core", 1), 2, 1)
    assert 0.0 < two.mixed_s < latency.mixed_s


def test_an_unmeasured_parallelism_is_carried_over_and_says_so() -> None:
    profile = profile_from(measured_profile())
    base = roofline("llama-2-7b", "cpu-core", 1)
    one, _ = profile.latency(base, 1, 1)
    two, _ = profile.latency(base, 2, 1)
    assert two.prefill_s([(512, 0)]) < one.prefill_s([(512, 0)])
    assert two.outside(10, 10) == ("measured at 1x1, carried over to 2x1",)


def test_measured_transfers_become_a_link() -> None:
    link = fit_link(profile_from(measured_profile()).transfers)
    assert link.transfer_s(1e7) == pytest.approx(1e-5 + 1e7 / 3e9, rel=0.05)


def test_a_profile_of_something_else_is_refused() -> None:
    profile = profile_from(measured_profile())
    profile.check_fits("demo", "cpu-core")
    with pytest.raises(BadConfig, match="the plan is for 'llama'"):
        profile.check_fits("llama", "cpu-core")
    with pytest.raises(BadConfig, match="the plan is for 'l4'"):
        profile.check_fits("demo", "l4")


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ([], "profile"),
        ({"model": "m", "device": "d"}, "profile.runs"),
        ({"model": "m", "device": "d", "runs": []}, "profile.runs"),
        ({"model": "m", "device": "d", "runs": [{"prefil": []}]}, "profile.runs[0]"),
        ({"model": "m", "device": "d", "runs": [{"prefill": []}]}, "profile.runs[0]"),
        (
            {"model": "m", "device": "d", "runs": [{"prefill": [{"tokens": 5, "seconds": -1}]}]},
            "profile.runs[0].prefill[0].seconds",
        ),
    ],
)
def test_a_bad_profile_is_refused(content: object, field: str) -> None:
    with pytest.raises(BadConfig) as refusal:
        profile_from(content)
    assert refusal.value.field == field
